"""Kills, signals, full disks and damaged files, after which a run goes on as if nothing had happened."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fault_ranks import ended, started, wait_until
from models import save_embedder
from tiny_runs import CONFIG, ROOT, SYNTHETIC, batch_of, equal_bitwise, lines_of
from torch import nn

from e5core import checkpoint
from e5core.batches import pack
from e5core.distributed import ALONE
from e5core.encode import Encoder
from e5core.encoder import build_model
from e5core.lora import LoraConfig
from e5core.loss import LossConfig
from e5core.optim import AdamW, OptimConfig
from e5core.preemption import Preempted, Preemption
from e5core.sharding import Slice
from e5core.step import backward_step
from e5core.stretches import write_stretches
from e5core.train import main

STEPS, SIZE, N_RECORDS = 16, 4, 20  # the epochs end within steps 5, 10 and 15
READ_TO_ENCODE = {*checkpoint.ADAPTER_FILES, *checkpoint.CARD_FILES}
CHECKPOINT = {"manifest.json", "state.json", "optimizer_00000_of_00001.safetensors", *READ_TO_ENCODE}


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_embedder(tmp_path_factory.mktemp("embedder"))


@pytest.fixture(scope="module")
def config_file(embedder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("config")
    records = (SYNTHETIC / "en_sts.jsonl").read_text().splitlines(keepends=True)[:N_RECORDS]
    (folder / "records.jsonl").write_text("".join(records))
    text = CONFIG.format(run=folder / "run", model=embedder, data=folder / "records.jsonl")
    text = text.replace("steps = 6", f"steps = {STEPS}").replace("\nsize = 8", f"\nsize = {SIZE}")
    text = text.replace("micro_batch_tokens = 400", "micro_batch_tokens = 100")
    (folder / "config.toml").write_text(text)
    return folder / "config.toml"


def same(one: Path, other: Path, step: int = STEPS) -> bool:
    """Whether two runs have the same adapter and moments to the bit, and the same metrics."""
    return equal_bitwise(one, other, step) and lines_of(one) == lines_of(other)


def n_lines(run: Path) -> int:
    file = run / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.is_file() else 0


@pytest.fixture(scope="module")
def undisturbed(config_file: Path) -> Path:
    """A run on two ranks that nothing happened to."""
    run, log = config_file.parent / "undisturbed", config_file.parent / "undisturbed.log"
    with started(2, log, [str(config_file), f"train.run={run}"]) as ranks:
        assert ended(ranks, 120) == [0, 0], log.read_text()
    assert lines_of(run)[-1]["epoch"] == pytest.approx(STEPS * SIZE / N_RECORDS)
    return run


def survive(config_file: Path, run: Path, n_kills: int, seed: int) -> None:
    """Kill one rank of two or both, at moments of a step or of a save, and go on, to the end."""
    draw, log = random.Random(seed), run.parent / "log"
    arguments = [str(config_file), f"train.run={run}", "train.save_every=1", "train.resume=true"]
    for kill in range(n_kills):
        with started(2, log, arguments) as ranks:
            wanted = max(checkpoint.steps_of(run), default=0) + draw.randint(1, 3)
            wait_until(lambda: n_lines(run) >= wanted, ranks, log)  # noqa: B023
            if kill % 2:
                wait_until(lambda: any(run.glob(f"{checkpoint.PARTIAL}*")), ranks, log)
            time.sleep(draw.uniform(0, 0.03))
            victims = ranks if draw.random() < 0.5 else [draw.choice(ranks)]
            for victim in victims:
                os.kill(victim.pid, signal.SIGKILL)
            codes = ended(ranks, 20)  # those that wait for the dead in a collective too
            assert 0 not in codes, log.read_text()
    with started(2, log, arguments) as ranks:
        assert ended(ranks, 120) == [0, 0], log.read_text()
    assert len(checkpoint.steps_of(run)) == 2 and not [path for path in run.iterdir() if path.name.startswith(".")]


def test_kill_9_of_one_rank_or_all_in_a_step_or_a_save_changes_nothing(
    config_file: Path, undisturbed: Path, tmp_path: Path
) -> None:
    survive(config_file, tmp_path / "run", 2, seed=0)
    assert same(undisturbed, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
def test_kill_9_at_ten_moments_changes_nothing(seed: int, config_file: Path, undisturbed: Path, tmp_path: Path) -> None:
    survive(config_file, tmp_path / "run", 2, seed)
    assert same(undisturbed, tmp_path / "run")


def test_sigterm_to_one_rank_or_to_each_at_another_moment_leaves_together_and_goes_on(
    config_file: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    arguments = [str(config_file), f"train.run={run}", "train.resume=true", "train.save_every=0"]
    for n, order in enumerate(([1], [0, 1])):
        with started(2, log, arguments) as ranks:
            wait_until(lambda: n_lines(run) >= 3 * n + 2, ranks, log)  # noqa: B023
            assert not (run / "PREEMPTED").exists()
            for rank in order:
                os.kill(ranks[rank].pid, signal.SIGTERM)
                time.sleep(0.02)
            assert ended(ranks, 30) == [0, 0], log.read_text()
        step = checkpoint.steps_of(run)[-1]
        assert step == n_lines(run) < STEPS and json.loads((run / "PREEMPTED").read_text()) == {"step": step}
    assert log.read_text().count("which is saved; go on with train.resume=true") == 2
    with started(2, log, arguments) as ranks:
        assert ended(ranks, 120) == [0, 0], log.read_text()
    assert same(undisturbed, run) and not (run / "PREEMPTED").exists()


def test_sigterm_under_torchrun_ends_in_time_with_its_exit_code_1(config_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "e5core.train", str(config_file), f"train.run={run}", "train.steps=100000"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, cwd=ROOT, stderr=log)
        try:
            deadline = time.monotonic() + 120
            while n_lines(run) < 3 and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.01)
            process.send_signal(signal.SIGTERM)
            begun = time.monotonic()
            assert process.wait(timeout=60) == 1, (tmp_path / "log").read_text()
        finally:
            process.kill()
            process.wait()
    assert time.monotonic() - begun < 30
    step = checkpoint.steps_of(run)[-1]
    assert step == n_lines(run) >= 3 and json.loads((run / "PREEMPTED").read_text()) == {"step": step}
    checkpoint.check_newest(run, ALONE)


@pytest.mark.parametrize("number", [1, 2])
def test_a_step_is_left_at_the_next_micro_batch_of_either_pass(number: int, embedder: Path) -> None:
    batch, preemption, calls = batch_of(embedder, n=6), Preemption(ALONE), []
    n_micro_batches = len(pack(batch.sequences, 200, torch.device("cpu")))  # the second pass has one less
    at = {1: 2, 2: n_micro_batches + 2}[number]
    assert n_micro_batches > 4
    model = build_model(embedder, torch.float32, torch.device("cpu"), causal=True, lora=LoraConfig(rank=2), seed=0)
    before = [p.detach().clone() for p in model.parameters()]

    def ask(*_: object) -> None:
        calls.append(None)
        preemption.asked = len(calls) == at or preemption.asked

    model.register_forward_pre_hook(ask)
    with pytest.raises(Preempted):
        backward_step(model, batch, LossConfig(), 200, None, preemption=preemption)
    assert len(calls) == at
    assert all(torch.equal(p, was) for p, was in zip(model.parameters(), before, strict=True))


def test_a_disk_that_refuses_one_rank_is_named_on_all_at_the_next_step(
    config_file: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    arguments = [str(config_file), f"train.run={run}", "train.save_every=3"]
    with started(2, log, arguments, starved=1) as ranks:
        assert ended(ranks, 60) == [2, 2], log.read_text()
    said = log.read_text()
    for rank in (0, 1):
        assert f"rank {rank}: e5core.train: could not save {run}/step_3 on rank 1: " in said
    assert "File too large" in said and "go on with train.resume=true" in said and "Traceback" not in said
    assert 3 <= n_lines(run) < 6 and checkpoint.steps_of(run) == [] and not any(run.glob(".part*"))
    with started(2, log, [*arguments, "train.resume=true"]) as ranks:
        assert ended(ranks, 120) == [0, 0], log.read_text()
    assert same(undisturbed, run)


@pytest.fixture(scope="module")
def four_steps(config_file: Path) -> Path:
    run = config_file.parent / "four-steps"
    assert main([str(config_file), f"train.run={run}", "train.steps=4"]) == 0
    assert checkpoint.steps_of(run) == [2, 4]
    return run


@pytest.fixture
def trained(config_file: Path, four_steps: Path, tmp_path: Path) -> tuple[Path, list[str]]:
    """A run of its own that has ended, and the arguments to resume it."""
    run = shutil.copytree(four_steps, tmp_path / "run")
    return run, [str(config_file), f"train.run={run}", "train.steps=4", "train.resume=true"]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def tear(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


@pytest.mark.parametrize("damage", [flip, tear, Path.unlink])
def test_every_damaged_file_is_named_and_the_checkpoint_before_offered(
    damage: Callable[[Path], None],
    trained: tuple[Path, list[str]],
    four_steps: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    run, arguments = trained
    folder = run / "step_4"
    assert {path.name for path in folder.iterdir()} == CHECKPOINT
    for name in CHECKPOINT:
        kept = (folder / name).read_bytes()
        damage(folder / name)
        capfd.readouterr()
        assert main(arguments) == 2
        said = capfd.readouterr().err
        if (folder / "manifest.json").exists():
            assert f"{folder}: {name} " in said
            assert f"delete this folder (rm -r {folder}) and go on from step_2 with train.resume=true" in said
        else:
            assert f"{folder}: no manifest.json" in said
        if name in READ_TO_ENCODE and damage is not Path.unlink:
            with pytest.raises(ValueError, match=name):
                Encoder.load(str(folder))
        (folder / name).write_bytes(kept)
    shutil.rmtree(folder)
    assert main(arguments) == 0 and same(four_steps, run, 4)


def test_where_no_checkpoint_is_whole_nothing_is_deleted(
    trained: tuple[Path, list[str]], capfd: pytest.CaptureFixture[str]
) -> None:
    run, arguments = trained
    shutil.rmtree(run / "step_2")
    flip(run / "step_4" / "adapter_model.safetensors")
    assert main(arguments) == 2 and "and begin anew: train.overwrite=true" in capfd.readouterr().err
    (run / "step_4" / "manifest.json").unlink()
    assert main(arguments) == 2 and "move this folder away" in capfd.readouterr().err
    assert (run / "step_4" / "adapter_model.safetensors").is_file() and n_lines(run) == 4


def test_a_checkpoint_of_another_lora_is_refused_on_every_rank(
    trained: tuple[Path, list[str]], config_file: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run, arguments = trained
    other = tmp_path / "other"
    assert main([str(config_file), f"train.run={other}", "train.steps=2", "lora.rank=2"]) == 0
    shutil.rmtree(run / "step_4")
    shutil.rmtree(run / "step_2")
    shutil.copytree(other / "step_2", run / "step_2")
    with started(2, tmp_path / "log", arguments) as ranks:
        assert ended(ranks, 60) == [2, 2]
    said = (tmp_path / "log").read_text()
    assert all(f"rank {rank}: e5core.train: {run}/step_2: lora was {{'rank': 2," in said for rank in (0, 1))


def slices(shapes: dict[str, tuple[int, ...]], rank: int, world_size: int) -> dict[str, nn.Parameter | Slice]:
    """Parameters as ranks hold them in stretches: cut where the tensors, laid end to end, are cut evenly."""
    total, begun, held = sum(map(lambda shape: torch.Size(shape).numel(), shapes.values())), 0, {}
    first, last = total * rank // world_size, total * (rank + 1) // world_size
    for name, shape in shapes.items():
        n = torch.Size(shape).numel()
        start, stop = (min(max(border - begun, 0), n) for border in (first, last))
        held[name] = Slice(nn.Parameter(torch.zeros(stop - start)), start, shape)
        begun += n
    return held


@pytest.mark.parametrize("n_writers", [1, 2, 3])
@pytest.mark.parametrize("sharded", [False, True])
def test_what_any_number_of_ranks_wrote_any_other_reads(n_writers: int, sharded: bool, tmp_path: Path) -> None:
    shapes = {"a": (3, 4), "b": (1,), "c": (2, 5)}
    config, generator = OptimConfig(), torch.Generator().manual_seed(0)
    sizes = {f"{name}.{which}": torch.Size(s).numel() for name, s in shapes.items() for which in ("first", "second")}
    wanted = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}

    def optimizer(rank: int, world_size: int, sharded: bool) -> AdamW:
        whole = {name: nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}
        return AdamW(slices(shapes, rank, world_size) if sharded else whole, config)

    for rank in range(n_writers):
        writer = optimizer(rank, n_writers, sharded)
        for name, held in writer.state().items():
            held.values.copy_(wanted[name][held.start : held.stop])
        state = writer.state()
        own = state if sharded else {name: part.share(rank, n_writers) for name, part in state.items()}
        write_stretches(tmp_path / f"optimizer_{rank}.safetensors", own)
    for world_size in (1, 2, 4):
        for to_stretches in (False, True):
            for rank in range(world_size):
                reader = optimizer(rank, world_size, to_stretches).state()
                checkpoint.read_parts(tmp_path, "optimizer", reader)
                assert all(held.values.equal(wanted[name][held.start : held.stop]) for name, held in reader.items())
    for changed in ({"a": (4, 3)}, {"a": (3, 4)}, {**shapes, "d": (2,)}):
        with pytest.raises(ValueError, match="of another model or of other LoRA targets"):
            other = {name: nn.Parameter(torch.zeros(shape)) for name, shape in changed.items()}
            checkpoint.read_parts(tmp_path, "optimizer", AdamW(other, config).state())
