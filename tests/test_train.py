"""The training step is exact for any micro-batch size, and a run survives what happens to runs."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from models import moments, save_embedder
from safetensors.torch import load_file, save_file
from test_backbone import relative
from tiny_runs import CONFIG, ROOT, SYNTHETIC, batch_of, equal_bitwise, lines_of, train_until, weights_of

from e5core import checkpoint
from e5core.batches import GlobalBatch, MicroBatch
from e5core.config import load_config
from e5core.encode import Encoder
from e5core.encoder import build_model
from e5core.lora import LoraConfig, adapters
from e5core.loss import LossConfig, infonce_loss
from e5core.optim import AdamW, OptimConfig
from e5core.step import backward_step
from e5core.train import Config, main, train


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_embedder(tmp_path_factory.mktemp("embedder"))


@pytest.fixture
def config_file(embedder: Path, tmp_path: Path) -> Path:
    file = tmp_path / "config.toml"
    file.write_text(CONFIG.format(run=tmp_path / "run", model=embedder, data=SYNTHETIC / "en_sts.jsonl"))
    return file


def gradients(embedder: Path, batch: GlobalBatch, budget: int, dtype: torch.dtype) -> tuple[float, torch.Tensor]:
    lora = LoraConfig(rank=4, dropout=0.1)
    model = build_model(embedder, dtype, torch.device("cpu"), causal=True, lora=lora, seed=0)
    generator = torch.Generator().manual_seed(1)
    for _, linear in adapters(model.backbone):
        linear.lora_b.data.normal_(0, 0.1, generator=generator)
    # temperature 0.5 keeps the loss of a random model unsaturated
    result = backward_step(model, batch, LossConfig(temperature=0.5), budget, dropout=(7, 4))
    return result.loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize(("dtype", "gradient_error", "loss_error"), [
    (torch.float64, 1e-12, 1e-12),
    (torch.float32, 2e-5, 1e-6),
])  # fmt: skip
def test_loss_and_gradients_do_not_depend_on_the_micro_batch(
    dtype: torch.dtype, gradient_error: float, loss_error: float, embedder: Path
) -> None:
    batch = batch_of(embedder)
    assert batch.n_tokens > 2500
    whole_loss, whole = gradients(embedder, batch, batch.n_tokens, dtype)
    for budget in (64, 1000):
        loss, gradient = gradients(embedder, batch, budget, dtype)
        assert abs(loss - whole_loss) < loss_error * whole_loss
        assert relative(gradient, whole) < gradient_error


def test_steps_on_one_batch_lower_its_loss(embedder: Path) -> None:
    batch = batch_of(embedder, n=8)
    model = build_model(embedder, torch.float32, torch.device("cpu"), causal=True, lora=LoraConfig(rank=4), seed=0)
    for _, linear in adapters(model.backbone):
        linear.lora_b.data.normal_(0, 0.1)  # with B = 0 this random model gives all texts one vector
    optimizer = AdamW({name: p for name, p in model.named_parameters() if p.requires_grad}, OptimConfig())
    losses = []
    for _ in range(12):
        losses.append(backward_step(model, batch, LossConfig(temperature=0.5), 1000, None).loss.item())
        optimizer.clip_gradients()
        optimizer.update(3e-3)
    assert losses[-1] < losses[0] - 0.01, losses


def test_the_step_s_gradient_is_autograd_s_of_the_whole(embedder: Path) -> None:
    batch = batch_of(embedder, n=6)
    lora = LoraConfig(rank=4, dropout=0.1)
    model = build_model(embedder, torch.float64, torch.device("cpu"), causal=True, lora=lora, seed=0)
    backward_step(model, batch, LossConfig(), budget=64, dropout=(0, 0))
    got = torch.cat([linear.lora_b.grad.flatten() for _, linear in adapters(model.backbone)])
    model.zero_grad()
    rows = []
    for row, ids in enumerate(batch.sequences):  # every text alone, one graph over all
        from_one = torch.tensor([0, len(ids)], dtype=torch.int32)
        rows.append(model(_single(ids, row, from_one), dropout=(0, 0))[0])
    infonce_loss(torch.stack(rows), batch, LossConfig()).loss.backward()
    expected = torch.cat([linear.lora_b.grad.flatten() for _, linear in adapters(model.backbone)])
    assert relative(got, expected) < 1e-12


def _single(ids: list[int], row: int, cu_seqlens: torch.Tensor) -> MicroBatch:
    return MicroBatch(torch.tensor(ids), cu_seqlens, len(ids), torch.tensor([row]))


def test_a_resumed_run_equals_one_that_never_stopped_bitwise(config_file: Path, tmp_path: Path) -> None:
    config = load_config(Config, config_file)
    train(config)
    stopped = replace(config, train=replace(config.train, run=str(tmp_path / "stopped"), save_every=2))
    with pytest.raises(KeyboardInterrupt):
        train_until(stopped, 5)
    assert checkpoint.steps_of(tmp_path / "stopped") == [2, 4]
    assert len(lines_of(tmp_path / "stopped")) == 5
    train(replace(stopped, train=replace(stopped.train, resume=True)))
    assert equal_bitwise(tmp_path / "run", tmp_path / "stopped", 6)
    assert lines_of(tmp_path / "run") == lines_of(tmp_path / "stopped")


def test_a_run_that_follows_a_growing_store_resumes_bitwise_though_it_grew_meanwhile(
    config_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    lines = (SYNTHETIC / "en_sts.jsonl").read_text().splitlines(keepends=True)

    def grow(store: Path, shard: str, first: int, last: int) -> None:
        store.mkdir(parents=True, exist_ok=True)
        with (store / shard).open("a") as file:
            file.writelines(lines[first:last])

    def grow_in_the_first_epoch(store: Path, step: int) -> None:
        if step == 1:
            grow(store, "00000.jsonl", 20, 25)
            grow(store, "00001.jsonl", 25, 35)

    runs = {}
    for name in ("never", "stopped"):  # the first two epochs end after 20 and 20 + 35 of 9 * 8 records
        store = tmp_path / name / "records"
        grow(store, "00000.jsonl", 0, 20)
        file = tmp_path / f"{name}.toml"
        file.write_text(config_file.read_text().replace(str(SYNTHETIC / "en_sts.jsonl"), str(store)))
        runs[name] = load_config(Config, file, [f"train.run='{tmp_path / name / 'run'}'", "train.steps=9"])
    never, stopped = tmp_path / "never", tmp_path / "stopped"

    def grow_never(step: int) -> None:
        grow_in_the_first_epoch(never / "records", step)
        if step == 5:
            grow(never / "records", "00001.jsonl", 35, 50)

    train_until(runs["never"], -1, grow_never)
    with pytest.raises(KeyboardInterrupt):
        train_until(runs["stopped"], 5, lambda step: grow_in_the_first_epoch(stopped / "records", step))
    grow(stopped / "records", "00001.jsonl", 35, 50)
    capfd.readouterr()
    train(replace(runs["stopped"], train=replace(runs["stopped"].train, resume=True)))
    told = re.findall("epoch .* begins .*", capfd.readouterr().err)
    assert told == [f"epoch {e} begins with 15 new records from {n} files" for e, n in ((2, 2), (3, 1))]
    assert equal_bitwise(never / "run", stopped / "run", 9)
    assert lines_of(never / "run") == lines_of(stopped / "run")
    assert lines_of(never / "run")[-1]["epoch"] == 2 + (72 - 55) / 50
    epochs = json.loads((stopped / "run" / "step_9" / "state.json").read_text())["epochs"]
    assert [len(shards) for shards in epochs] == [1, 2, 1]
    with (stopped / "records" / "00000.jsonl").open("r+") as file:
        file.write(" ")
    again = replace(runs["stopped"], train=replace(runs["stopped"].train, resume=True))
    with pytest.raises(ValueError, match=r"00000\.jsonl no longer begins"):
        train(again)


def test_a_folder_needs_steps_for_nobody_knows_how_many_an_epoch_will_be(
    config_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config_file.write_text(config_file.read_text().replace("steps = 6", "epochs = 1"))
    assert main([str(config_file), f"data.sources=[{{path='{SYNTHETIC}'}}]"]) == 2
    assert "data.sources[0].path" in (error := capfd.readouterr().err) and "give train.steps instead" in error
    assert not (tmp_path / "run").exists()


def test_the_run_folder_is_complete(config_file: Path, tmp_path: Path) -> None:
    assert main([str(config_file), "train.steps=12", "eval.every=6", 'eval.metric="stsb-cc-en-dev/spearman"',
                 f'eval.sets=[{{kind="sts", path="{ROOT}/data/sts/stsb-cc-en/dev.jsonl"}}]',
                 f'eval.report=[{{kind="sts", path="{ROOT}/data/sts/stsb-cc-en/test.jsonl"}}]']) == 0  # fmt: skip
    run = tmp_path / "run"
    lines = lines_of(run)
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert 8 < lines[0]["negatives_per_query"] <= 15  # 8 positives and 8 hard negatives, less the target, less doubles
    assert load_config(Config, run / "config.toml").train.steps == 12
    scores = json.loads((run / "evaluation.json").read_text())
    assert scores.keys() == {"before", "after"} and scores["before"].keys() == {"stsb-cc-en/spearman"}
    best = checkpoint.read_best(run)
    evaluated = {line["step"]: line["eval"]["stsb-cc-en-dev/spearman"] for line in lines if "eval" in line}
    assert best["value"] == max(evaluated.values()) == evaluated[best["step"]]
    assert best["step"] in checkpoint.steps_of(run)
    assert "Instruct:" in (run / "tokens.txt").read_text()
    encoder = Encoder.load(str(run))
    assert encoder.selfcheck() > 0.999999
    vectors = encoder.encode(["a", ""], task="Find it.")
    assert vectors.shape == (2, 32) and np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


def _start(config_file: Path, *overrides: str) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "e5core.train", str(config_file), *overrides]
    return subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def test_kill_9_in_the_middle_of_a_save_leaves_the_previous_checkpoint_whole(config_file: Path, tmp_path: Path) -> None:
    process = _start(config_file, "train.steps=100000", "train.save_every=1", "train.keep=3")
    run, deadline = tmp_path / "run", time.monotonic() + 120
    killed_inside = False
    while time.monotonic() < deadline and not killed_inside and process.poll() is None:
        steps = checkpoint.steps_of(run) if run.is_dir() else []
        if len(steps) >= 2 and any(run.glob(".partial_step_*")):
            os.kill(process.pid, signal.SIGKILL)
            killed_inside = True
    process.wait()
    assert killed_inside, process.stderr.read()
    process.stderr.close()
    newest = checkpoint.steps_of(run)[-1]
    assert Encoder.load(str(run)).selfcheck() > 0.999999
    resumed = load_config(Config, config_file, ["train.resume=true", f"train.steps={newest + 2}", "train.steps=100000"])
    with pytest.raises(KeyboardInterrupt):
        train_until(replace(resumed, train=replace(resumed.train, save_every=1, keep=3)), newest + 2)
    assert not any(run.glob(".partial_step_*")) or checkpoint.steps_of(run)[-1] >= newest + 1


FULL_DISK = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))
from e5core.train import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_disk_that_refuses_loses_nothing_and_is_named(config_file: Path, tmp_path: Path) -> None:
    assert main([str(config_file), "train.steps=4"]) == 0
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", FULL_DISK, str(config_file), "train.steps=4", "train.resume=true"]
    (tmp_path / "run" / "step_4").rename(tmp_path / "kept")  # the save of step 4 comes again, on the full disk
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2, result.stderr
    assert "could not save" in result.stderr and "train.resume=true" in result.stderr
    assert checkpoint.steps_of(tmp_path / "run") == [2]
    assert not any((tmp_path / "run").glob(".partial_step_*"))
    assert main([str(config_file), "train.steps=4", "train.resume=true"]) == 0
    kept, again = moments(tmp_path / "kept"), weights_of(tmp_path / "run", 4)
    assert all(torch.equal(kept[name], again[name]) for name in kept)


BAD = {
    "unknown key": (["optim.learning_rate=1"], "optim.learning_rate"),
    "no data": (["data.sources=[{path='none.jsonl'}]"], "data.sources[0].path"),
    "no evaluation set": (["eval.report=[{kind='sts', path='none.jsonl'}]"], "eval.report[0].path"),
    "no model": (["backbone.path='./none'"], "backbone.path"),
    "hub id": (["backbone.path='intfloat/e5-mistral-7b-instruct'"], "hf download intfloat/e5-mistral-7b-instruct"),
    "steps and epochs": (["train.epochs=1"], "either steps or epochs"),
    "bad target": (["lora.targets=['q_proj']"], "match no linear"),
    "metric of no set": (["eval.metric='x/spearman'"], "eval: metric must be one of"),
    "sets without every": (["eval.sets=[{kind='sts', path='x.jsonl'}]"], "every and sets go together"),
    "too long for the model": (["batch.max_tokens=513"], "the model was made for at most 512 tokens"),
    "unknown kind": (["batch.instruct_documents=['STS']"], "batch.instruct_documents[0]"),
    "bad range": (["lora.dropout=1.5"], "lora.dropout"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_configs_fail_before_anything_is_made(
    case: str, config_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    overrides, message = BAD[case]
    assert main([str(config_file), *overrides]) == 2
    error = capfd.readouterr().err
    assert message in error and "Traceback" not in error
    assert not (tmp_path / "run").exists()


def test_an_earlier_run_is_not_overwritten_by_accident(
    config_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([str(config_file), "train.steps=2"]) == 0
    assert main([str(config_file), "train.steps=2"]) == 2
    assert "train.resume=true" in capfd.readouterr().err
    assert main([str(config_file), "train.steps=2", "train.resume=true", "optim.lr=1e-5"]) == 2
    assert "optim.lr was 0.001, is 1e-05" in capfd.readouterr().err
    assert main([str(config_file), "train.steps=2", "train.overwrite=true"]) == 0
    (tmp_path / "run" / "config.toml").unlink()
    assert main([str(config_file), "train.steps=2", "train.overwrite=true"]) == 2
    assert "is no run folder" in capfd.readouterr().err


def test_a_failed_start_leaves_earlier_runs_alone(
    config_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([str(config_file), "train.steps=2"]) == 0
    broken = tmp_path / "broken.jsonl"
    broken.write_text("{\n")
    source = f"data.sources=[{{path='{broken}'}}]"
    assert main([str(config_file), "train.overwrite=true", source]) == 2
    assert "broken.jsonl:1" in capfd.readouterr().err
    assert checkpoint.steps_of(tmp_path / "run") == [2]
    assert main([str(config_file), f"train.run='{tmp_path / 'other'}'", source]) == 2
    assert not (tmp_path / "other").exists()


def test_another_base_or_tokenizer_is_refused_at_resume(
    config_file: Path, embedder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(embedder, tmp_path / "model")
    arguments = [str(config_file), f"backbone.path='{model}'"]
    assert main([*arguments, "train.steps=2"]) == 0
    named = model / "tokenizer_config.json"
    named.write_text(named.read_text().replace('"eos_token": "</s>"', '"eos_token": "<unk>"'))
    assert main([*arguments, "train.steps=2", "train.resume=true"]) == 2
    assert "tokenizer_contract was" in capfd.readouterr().err
    named.write_text(named.read_text().replace('"eos_token": "<unk>"', '"eos_token": "</s>"'))
    weights = load_file(model / "model.safetensors")
    save_file(weights | {"norm.weight": weights["norm.weight"] + 1}, model / "model.safetensors")
    assert main([*arguments, "train.steps=2", "train.resume=true"]) == 2
    assert "base_sha256 was" in capfd.readouterr().err


def test_the_best_checkpoint_survives_a_resume(config_file: Path, tmp_path: Path) -> None:
    dev = f'eval.sets=[{{kind="sts", path="{ROOT}/data/sts/stsb-cc-en/dev.jsonl"}}]'
    overrides = ["eval.every=1", 'eval.metric="stsb-cc-en-dev/spearman"', dev, "train.keep=6", "train.save_every=1"]
    assert main([str(config_file), "train.steps=3", *overrides]) == 0
    run = tmp_path / "run"
    best = checkpoint.read_best(run)
    (run / "best.json").unlink()  # as after a kill between the save and this file
    shutil.rmtree(run / "step_3")
    assert main([str(config_file), "train.steps=3", "train.resume=true", *overrides]) == 0
    assert checkpoint.read_best(run) == best


def test_dtype_auto_writes_its_choice_and_the_first_line_names_the_faces(
    config_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([str(config_file), "train.steps=1", "backbone.dtype='auto'"]) == 0
    lines = capfd.readouterr().err.splitlines()
    assert lines[0].startswith("device cpu") and re.search(r"(c\+\+|reference): attention, ", lines[0])
    assert re.search(r"reference: .*infonce, last_token", lines[0])
    chosen = load_config(Config, tmp_path / "run" / "config.toml").backbone.dtype
    assert chosen in ("float32", "bfloat16") and any(line.startswith(f"dtype {chosen} (auto: a") for line in lines)


def test_a_batch_without_negatives_stops_after_its_first_step(
    config_file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([str(config_file), "batch.size=1", "batch.negatives=0"]) == 2
    assert "does every batch hold a negative" in capfd.readouterr().err


def test_bf16_trains_and_its_masters_stay_fp32(config_file: Path, tmp_path: Path) -> None:
    assert main([str(config_file), "train.steps=3", "backbone.dtype='bfloat16'"]) == 0
    assert {tensor.dtype for tensor in weights_of(tmp_path / "run", 3).values()} == {torch.float32}
    lines = lines_of(tmp_path / "run")
    assert all(0 < line["loss"] < 20 for line in lines)
    assert Encoder.load(str(tmp_path / "run")).selfcheck() > 0.999


def test_changed_data_is_refused_at_resume(
    config_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data.jsonl"
    lines = (SYNTHETIC / "en_sts.jsonl").read_text().splitlines(keepends=True)
    data.write_text("".join(lines))
    source = f"data.sources=[{{path='{data}'}}]"
    assert main([str(config_file), "train.steps=2", source]) == 0
    data.write_text("".join(lines[:-1]))
    assert main([str(config_file), "train.steps=2", "train.resume=true", source]) == 2
    assert "training records have changed" in capfd.readouterr().err


def test_a_loss_that_is_not_finite_names_the_records(embedder: Path) -> None:
    batch = batch_of(embedder, n=4)
    model = build_model(embedder, torch.float32, torch.device("cpu"), causal=True, lora=LoraConfig(rank=2), seed=0)
    model.backbone.tok_embeddings.weight.data[batch.sequences[2][5]] = torch.nan
    with pytest.raises(FloatingPointError, match="not finite.*en_short_long_a:3"):
        backward_step(model, batch, LossConfig(), 200, None)


def test_another_base_model_is_refused_when_loading(config_file: Path, tmp_path: Path) -> None:
    model = save_embedder(tmp_path / "model")
    assert main([str(config_file), "train.steps=2", f"backbone.path='{model}'"]) == 0
    weights = load_file(model / "model.safetensors")
    weights["norm.weight"] += 1
    save_file(weights, model / "model.safetensors")
    with pytest.raises(ValueError, match="not the base model"):
        Encoder.load(str(tmp_path / "run"))


def test_small_sources_train_in_homogeneous_batches(config_file: Path, tmp_path: Path) -> None:
    lines = (SYNTHETIC / "en_sts.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    sources = [tmp_path / "small.jsonl", tmp_path / "smaller.jsonl"]
    for source, part in zip(sources, (lines[:20], lines[20:27]), strict=True):  # of whole batches of 8: 2 and none
        source.write_text("".join(part), encoding="utf-8")
    tables = "".join(f'[[data.sources]]\npath = "{source}"\n' for source in sources)
    text = re.sub(r"\[\[data\.sources\]\]\npath = .*\n", lambda _: tables, config_file.read_text())
    config_file.write_text(text.replace("[batch]\n", '[batch]\ncomposition = "homogeneous"\n'))
    assert main([str(config_file)]) == 0
    assert len(lines_of(tmp_path / "run")) == 6
