"""Any number of ranks is one run: the same loss, gradients, vectors, metrics, adapter; a fault is said and ends all."""

import json
import os
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import moments, save_embedder
from rank_laws import BUDGETS, TEXTS, again, cut_to, measured, text, trainings
from ranks import free_port, run_ranks
from safetensors.torch import load_file, save_file
from tiny_runs import CONFIG, ROOT, SYNTHETIC

from e5core import checkpoint, encode, evaluate
from e5core.batches import deal
from e5core.config import load_config
from e5core.distributed import ALONE
from e5core.train import Config, train

N_RECORDS = 7  # an uneven tail for 2, 3 and 4 ranks
TOLERANCES = {"float64": 1e-12, "float32": 2e-5}


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose attention is sharp, since one that gives all texts one vector trains on rounding errors."""
    folder = save_embedder(tmp_path_factory.mktemp("embedder"))
    weights = load_file(folder / "model.safetensors")
    sharp = {name: 5 * tensor if "q_proj" in name or "k_proj" in name else tensor for name, tensor in weights.items()}
    save_file(sharp, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def one(embedder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return measured(ALONE, str(embedder), N_RECORDS, str(tmp_path_factory.mktemp("one") / "store"))


@pytest.fixture(scope="module", params=[2, 3, 4])
def ranks(
    request: pytest.FixtureRequest, embedder: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    store = tmp_path_factory.mktemp("ranks") / "store"
    return run_ranks(request.param, measured, str(embedder), N_RECORDS, str(store))


def distance(got: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


def test_items_are_dealt_once_evenly_and_to_every_rank() -> None:
    sizes = [int(size) for size in np.random.default_rng(0).integers(0, 500, 200)]
    for world_size in (1, 2, 3, 7):
        dealt = deal(sizes, world_size)
        assert sorted(item for own in dealt for item in own) == list(range(200))
        assert all(own == sorted(own) for own in dealt)
        loads = [sum(sizes[item] for item in own) for own in dealt]
        assert max(loads) - min(loads) <= 500 / 10
    assert [len(own) for own in deal([900, 0, 0], 3)] == [1, 1, 1]
    assert deal([5, 5], 3) == [[0], [1], []]


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("budget", BUDGETS)
def test_loss_and_gradients_do_not_depend_on_the_number_of_ranks(
    dtype: str, budget: int, ranks: list[dict[str, Any]], one: dict[str, Any]
) -> None:
    wanted = one["steps"][dtype, budget]
    loss, accuracy, negatives = wanted["figures"]
    assert 0.3 < loss / np.log(1 + negatives) < 1.2 and accuracy < 1  # unsaturated: a saturated loss hides faults
    for rank in ranks:
        got = rank["steps"][dtype, budget]
        assert got["figures"] == ranks[0]["steps"][dtype, budget]["figures"]
        assert got["figures"][0] == pytest.approx(loss, rel=min(TOLERANCES[dtype], 1e-6))
        assert got["figures"][1:] == pytest.approx([accuracy, negatives], rel=1e-6)  # accuracy comes in fp32
        assert distance(got["gradient"], wanted["gradient"]) < TOLERANCES[dtype]
        cosine = got["gradient"] @ wanted["gradient"]
        assert cosine / np.linalg.norm(got["gradient"]) / np.linalg.norm(wanted["gradient"]) > 1 - 1e-6
        assert np.array_equal(got["gradient"], ranks[0]["steps"][dtype, budget]["gradient"])
        assert got["tokens"] == wanted["tokens"]


def test_ranks_have_other_numbers_of_rows_and_micro_batches(ranks: list[dict[str, Any]], one: dict[str, Any]) -> None:
    steps = [rank["steps"]["float64", BUDGETS[0]] for rank in ranks]
    assert sorted(row for step in steps for row in step["rows"]) == one["steps"]["float64", BUDGETS[0]]["rows"]
    assert len({len(step["rows"]) for step in steps}) > 1
    counts = [step["n_micro_batches"] for step in steps]
    assert max(counts) > min(counts), counts


def test_vectors_do_not_depend_on_the_number_of_ranks(ranks: list[dict[str, Any]], one: dict[str, Any]) -> None:
    assert one["vectors"][3].shape == (len(TEXTS), 32)
    for rank in ranks:
        for got, wanted, first in zip(rank["vectors"], one["vectors"], ranks[0]["vectors"], strict=True):
            assert got.shape == wanted.shape and np.abs(got - wanted).max() < 2e-6
            assert np.array_equal(got, first)


def test_gathered_rows_keep_their_places_and_their_gradients_are_sums(
    ranks: list[dict[str, Any]], one: dict[str, Any]
) -> None:
    for found in (one, *ranks):
        assert found["gathered"]["equal"]
        assert found["gathered"]["total"] < 1e-12 and found["gathered"]["gradient"] < 1e-12


def test_ranks_tell_one_another_json(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["shared"] == [{"rank": r, "tram": "Straße" * r, "half": 0.5} for r in range(len(ranks))]


def test_what_differs_is_named_on_every_rank(ranks: list[dict[str, Any]], one: dict[str, Any]) -> None:
    assert one["different"] == ""
    for rank in ranks:
        assert rank["different"].startswith("rank 1 began with another configuration than rank 0: mine is 1, not 0;")


def test_a_loss_that_is_not_finite_names_the_same_records_on_every_rank(ranks: list[dict[str, Any]]) -> None:
    assert {rank["broken"] for rank in ranks} == {ranks[0]["broken"]}
    assert "the loss is not finite (nan): embeddings of records r" in ranks[0]["broken"]


def test_a_growing_store_is_looked_at_by_one_rank_for_all(ranks: list[dict[str, Any]], one: dict[str, Any]) -> None:
    for rank in ranks:
        assert rank["epochs"] == one["epochs"]
    assert sorted(one["epochs"][0]) == sorted(one["epochs"][1]) == [f"q{i}" for i in range(4)]


def test_the_gradient_has_scale_1_where_others_have_another_scale_or_direction(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        found, world_size = rank["patterns"], len(ranks)
        assert found["ours"] == pytest.approx((1.0, 1.0), abs=1e-12)
        assert found["own slice, all rows"] == pytest.approx((1 / world_size, 1.0), abs=1e-6)  # 0.25 for 4 ranks
        assert found["gradient gather, times W"] == pytest.approx((world_size, 1.0), abs=1e-6)
        assert found["own slice, local rows"][1] < 0.99


def test_some_steps_equal_those_of_ddp_cross_entropy_and_torch_s_adamw(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        begun, ours, theirs = rank["beside ddp"]
        assert distance(begun, theirs) > 1e-2
        assert distance(ours, theirs) < 1e-10


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def adapter(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(checkpoint.step_folder(run, step) / "adapter_model.safetensors")


def whole_state(run: Path, step: int) -> dict[str, torch.Tensor]:
    return adapter(run, step) | moments(checkpoint.step_folder(run, step))


@pytest.fixture(scope="module")
def config_file(embedder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trainings")
    pairs = (ROOT / "data/sts/stsb-cc-en/dev.jsonl").read_text().splitlines(keepends=True)[:40]
    (folder / "pairs.jsonl").write_text("".join(pairs))
    text = CONFIG.format(run=folder / "1", model=embedder, data=SYNTHETIC / "en_sts.jsonl")
    text = text.replace("size = 8", "size = 7").replace('dtype = "float32"', 'dtype = "auto"')
    text = text.replace("lr = 1e-3", "lr = 2e-4").replace("max_tokens = 48", "max_tokens = 140")  # past the instruction
    sets = f'[{{kind = "sts", path = "{folder}/pairs.jsonl"}}]'
    text += (
        f'\n[loss]\ntemperature = 0.5\n[eval]\nevery = 3\nmetric = "pairs/spearman"\nsets = {sets}\nreport = {sets}\n'
    )
    file = folder / "config.toml"
    file.write_text(text)
    return file


@pytest.fixture(scope="module")
def trained(config_file: Path) -> dict[int, list[list[str]]]:
    """Train in one process, then on 2 and on 3 ranks, which resume runs too.  Returns what these were refused."""
    config = load_config(Config, config_file, ['backbone.dtype="float32"'])
    train(config)
    folder = config_file.parent
    fixed = folder / "fixed.toml"
    fixed.write_text(config_file.read_text().replace('dtype = "auto"', 'dtype = "float32"'))
    refused = {n: run_ranks(n, trainings, str(fixed), str(folder / str(n)), str(folder / "1")) for n in (2, 3)}
    cut_to(folder / "2", folder / "1-of-another", 4)
    train(again(config, str(folder / "1-of-another")))
    return refused


@pytest.mark.parametrize("name", ["2", "3", "1-of-another", "2-of-another", "3-of-another"])
def test_a_training_is_the_same_on_any_number_of_ranks_and_goes_on_on_any(
    name: str, trained: dict[int, list[list[str]]], config_file: Path
) -> None:
    one, other = config_file.parent / "1", config_file.parent / name
    assert len(lines(one)) == 6
    for wanted, got in zip(lines(one), lines(other), strict=True):
        assert wanted.keys() == got.keys()
        assert got["loss"] == pytest.approx(wanted["loss"], rel=1e-6)
        assert got["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-4)
        for key in ("step", "lr", "negatives_per_query", "tokens", "truncated", "epoch"):
            assert got[key] == pytest.approx(wanted[key], rel=1e-6), key
    for step in (4, 6):
        wanted, got = adapter(one, step), adapter(other, step)
        assert wanted.keys() == got.keys()
        for tensor in wanted:
            assert (got[tensor] - wanted[tensor]).norm() <= 1e-4 * wanted[tensor].norm(), tensor
    assert sorted(path.name for path in other.iterdir()) == sorted(path.name for path in one.iterdir())
    scores, expected = (json.loads((run / "evaluation.json").read_text()) for run in (other, one))
    assert scores["before"] == pytest.approx(expected["before"]) and scores.keys() == expected.keys()


@pytest.mark.parametrize("n", [2, 3])
def test_a_run_resumed_on_as_many_ranks_is_bitwise_the_same(
    n: int, trained: dict[int, list[list[str]]], config_file: Path
) -> None:
    run, resumed = config_file.parent / str(n), config_file.parent / f"{n}-resumed"
    assert checkpoint.steps_of(resumed)[-1] == 6
    wanted, got = whole_state(run, 6), whole_state(resumed, 6)
    assert wanted.keys() == got.keys() and all(torch.equal(wanted[name], got[name]) for name in wanted)
    timed = ("seconds", "data_seconds", "tokens_per_s")
    plain = [[{k: v for k, v in line.items() if k not in timed} for line in lines(r)] for r in (run, resumed)]
    assert plain[0] == plain[1]


def test_too_many_ranks_and_other_configs_are_refused_on_every_rank(
    trained: dict[int, list[list[str]]], config_file: Path
) -> None:
    for n, refused in trained.items():
        assert len(refused) == n
        for few, different, exists in refused:
            assert few.startswith(f"batch.size = 1 is less than the number of ranks, {n}, and every rank needs a query")
            assert "rank 1 began with another configuration than rank 0: optim.lr is 0.0004, not 0.0002" in different
            assert "go on with train.resume=true" in exists
        assert not any((config_file.parent / f"{n}-{name}").exists() for name in ("few", "different"))


BROKEN = """
import sys, time
import e5core.prefetch
import e5core.train

whole = e5core.prefetch.build_batch

def build_batch(*arguments):
    if arguments[4] == 2 and arguments[-1].rank == 1:
        print("moment", time.time(), file=sys.stderr, flush=True)
        raise {error}("the tram is late")
    return whole(*arguments)

e5core.prefetch.build_batch = build_batch
sys.exit(e5core.train.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("error", ["RuntimeError", "ValueError"])
def test_a_rank_that_raises_ends_the_job_in_seconds_and_says_why(error: str, config_file: Path, tmp_path: Path) -> None:
    script = tmp_path / "broken.py"
    script.write_text(BROKEN.format(error=error))
    done = torchrun(2, str(script), str(config_file), f"train.run='{tmp_path / 'run'}'", "train.save_every=1")
    ended = time.time()
    assert done.returncode != 0
    moment = float(next(line for line in done.stderr.splitlines() if line.startswith("moment")).split()[1])
    assert ended - moment < 20, done.stderr
    if error == "RuntimeError":
        assert "Traceback" in done.stderr and "RuntimeError: the tram is late" in done.stderr
    else:
        assert "rank 1: e5core.train: the tram is late" in done.stderr
    assert checkpoint.steps_of(tmp_path / "run") == [1, 2]


def small_sets(folder: Path) -> list[str]:
    """Write a set of clustering, pair classification and reranking.  Returns their arguments."""
    texts = [text(30 + 5 * i, i) for i in range(24)]
    labelled = [{"text": x, "label": "abc"[i % 3]} for i, x in enumerate(texts)]
    alike = [{"sentence1": x, "sentence2": y, "label": i % 2} for i, (x, y) in enumerate(pairwise(texts))]
    ranked = [{"query": x, "positive": texts[:2], "negative": texts[2:9]} for x in texts[9:]]
    arguments: list[str] = []
    for kind, lines in (("clustering", labelled), ("pair-classification", alike), ("reranking", ranked)):
        path = folder / kind / "test.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        arguments += [f"--{kind}", str(path.parent)]
    return [*arguments, "--task", "clustering=Find the group."]


def test_the_commands_run_under_torchrun(config_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    overrides = [f"train.run='{run}'", "train.steps=2", "eval.every=2"]
    done = torchrun(2, "-m", "e5core.train", str(config_file), *overrides)
    assert done.returncode == 0, done.stderr
    said = done.stderr.splitlines()
    assert sum(line.startswith("dtype ") for line in said) == sum(line.startswith("step 2/2 ") for line in said) == 1
    assert sum("; ranks: 2" in line for line in said) == 1
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["pairs/spearman"]
    pairs = config_file.parent / "pairs.jsonl"
    passkey = ["--passkey", "128", "--passkey-documents", "5"]
    evaluation = [str(run), "--sts", str(pairs), *small_sets(tmp_path / "sets"), *passkey, "--out"]
    done = torchrun(3, "-m", "e5core.evaluate", "--strategy", "full", *evaluation, str(tmp_path / "3.json"))
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 6
    assert evaluate.main([*evaluation, str(tmp_path / "1.json")]) == 0
    scores = [json.loads((tmp_path / f"{n}.json").read_text()) for n in (1, 3)]
    assert scores[0] == pytest.approx(scores[1])
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:2]))
    encoding = [str(run), "--input", str(texts), "--selfcheck", "--output"]
    done = torchrun(3, "-m", "e5core.encode", "--strategy", "full", *encoding, str(tmp_path / "3.npy"))
    assert done.returncode == 0 and "selfcheck passed" in done.stderr, done.stderr
    assert encode.main([*encoding, str(tmp_path / "1.npy")]) == 0
    one, three = (np.load(tmp_path / f"{n}.npy") for n in (1, 3))
    assert one.shape == (2, 32) and np.abs(one - three).max() < 1e-5


def test_two_nodes_that_meet_by_c10d_have_the_numbers_of_one_process(
    trained: dict[int, list[list[str]]], config_file: Path, tmp_path: Path
) -> None:
    meeting = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-id", "job"]
    meeting += ["--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--local-addr", "127.0.0.1"]
    fixed = str(config_file.parent / "fixed.toml")
    overrides = [f"train.run='{tmp_path / 'run'}'", "eval.report=[]"]
    nodes = [begun([*meeting, "--nproc-per-node", "1", "-m", "e5core.train", fixed, *overrides]) for _ in range(2)]
    said = [node.communicate(timeout=240)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    for wanted, got in zip(lines(config_file.parent / "1"), lines(tmp_path / "run"), strict=True):
        assert got["loss"] == pytest.approx(wanted["loss"], rel=1e-6)
        assert got["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-4)


def begun(arguments: list[str]) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", *arguments]
    return subprocess.Popen(
        command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def torchrun(n: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    process = begun(["--standalone", "--nproc-per-node", str(n), *arguments])
    try:
        output, errors = process.communicate(timeout=240)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)
