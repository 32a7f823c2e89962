"""Worker processes change nothing but who builds a batch, and end with the trainer however it ends."""

import json
import multiprocessing
import os
import re
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import fault_ranks
import pytest
import torch
from models import save_embedder
from ranks import forkserver
from tiny_runs import CONFIG, SYNTHETIC, equal_bitwise, lines_of, train_until

from e5core.batches import BatchConfig
from e5core.checkpoint import step_folder, steps_of
from e5core.config import load_config
from e5core.distributed import ALONE, World
from e5core.mixture import DataConfig, Mixture, Source, load_mixture
from e5core.prefetch import Batches, Made, Recipe
from e5core.records import Record, read_records
from e5core.tokenizer import Tokenizer, TokenizerConfig
from e5core.train import Config, main, train

BATCH = BatchConfig(size=8, max_tokens=48, micro_batch_tokens=200, instruct_documents=("sts",))
LINES = (SYNTHETIC / "en_sts.jsonl").read_text().splitlines(keepends=True)


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_embedder(tmp_path_factory.mktemp("embedder"))


def batches(embedder: Path, mixture: Mixture, steps: int, n_workers: int, world: World = ALONE) -> Batches:
    recipe = Recipe(embedder, TokenizerConfig(), BATCH, 3, world)
    return Batches(mixture, Tokenizer.load(embedder), recipe, range(steps), n_workers)


def tensors(made: Made) -> list[torch.Tensor]:
    batch, packed = made
    return [*batch.relations.tensors(), *(t for p in packed for t in (p.tokens, p.cu_seqlens, p.rows))]


def same(one: Made, other: Made) -> bool:
    """Whether two batches have the same values of the same types."""
    tables = [replace(batch, relations=None) for batch, _ in (one, other)]
    sizes = [[(p.max_seqlen, p.n_shared) for p in packed] for _, packed in (one, other)]
    pairs = zip(tensors(one), tensors(other), strict=True)
    return tables[0] == tables[1] and sizes[0] == sizes[1] and all(a.equal(b) and a.dtype == b.dtype for a, b in pairs)


def test_three_workers_give_the_same_batches_and_begin_epochs_at_the_same_steps(embedder: Path, tmp_path: Path) -> None:
    file, world = tmp_path / "records" / "00000.jsonl", World(rank=1, world_size=2, device=torch.device("cpu"))
    file.parent.mkdir()

    def run(n_workers: int) -> tuple[list[Made], list[dict]]:
        file.write_text("".join(LINES[:20]))  # the first epoch ends within step 2
        mixture, _ = load_mixture(DataConfig(sources=(Source(path=str(file.parent)),)), 3)
        made, states = [], []
        with batches(embedder, mixture, 9, n_workers, world) as ahead:
            for step in range(9):
                made.append(ahead.take(step))
                states.append(mixture.state())
                if step == 1:
                    file.write_text("".join(LINES[:35]))
        return made, states

    (plain, states), (ahead, states_ahead) = run(0), run(3)
    assert all(same(*pair) for pair in zip(plain, ahead, strict=True)) and states == states_ahead
    assert [len(state["epochs"]) for state in states] == [1, 1, 2, 2, 2, 2, 3, 3, 3]
    assert all(len(packed) > 1 and len(batch.rows) < 24 for batch, packed in plain)


def test_an_error_comes_as_it_would_without_workers_and_a_killed_worker_is_named(embedder: Path) -> None:
    records = read_records([SYNTHETIC / "en_sts.jsonl"])[0][:40]
    records.append(Record(id="bad", task="", query="half \ud800", positives=("p",), source="x"))
    mixture, errors = Mixture([records], [1], 3), []
    for n_workers in (0, 1):
        with batches(embedder, mixture, 100, n_workers) as ahead:
            taken = 0
            with pytest.raises(ValueError, match="surrogate") as error:
                for step in range(100):
                    ahead.take(step)
                    taken += 1
            errors.append((type(error.value), str(error.value), taken))
            if n_workers:
                ahead.take(taken + 1)
                (worker,) = multiprocessing.active_children()
                os.kill(worker.pid, signal.SIGKILL)
                begun = time.monotonic()
                named = rf"data worker 0 \(process {worker.pid}\) was ended by SIGKILL with the batch of step \d"
                with pytest.raises(ChildProcessError, match=named):
                    for step in range(taken + 2, taken + 4):  # the first may be here already
                        ahead.take(step)
                assert time.monotonic() - begun < 5
    assert errors[0] == errors[1] and 0 < errors[0][2] < 5 and not multiprocessing.active_children()


def contents(run: Path) -> dict[str, bytes]:
    """The files of the last checkpoint, less those of which safetensors does not settle the bytes."""
    files = (path for path in step_folder(run, 6).iterdir() if path.name != "manifest.json")
    return {path.name: path.read_bytes() for path in files if not path.name.startswith("optimizer")}


def test_a_run_with_workers_that_was_stopped_and_resumed_has_the_bytes_of_one_without(
    embedder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "config.toml"
    file.write_text(CONFIG.format(run=tmp_path / "run", model=embedder, data=SYNTHETIC / "en_sts.jsonl"))
    train(load_config(Config, file))
    overrides = ["data.workers=1", f"train.run={tmp_path / 'stopped'}"]
    with pytest.raises(KeyboardInterrupt):
        train_until(load_config(Config, file, overrides), 5)
    assert not multiprocessing.active_children()
    assert main([str(file), *overrides, "train.resume=true"]) == 0
    run, stopped = tmp_path / "run", tmp_path / "stopped"
    assert contents(run) == contents(stopped) and len(contents(run)) >= 4 and lines_of(run) == lines_of(stopped)
    assert equal_bitwise(run, stopped, 6)


def trainer(log: str, arguments: list[str]) -> None:
    """Train as the leader of a process group of its own, as torchrun's ranks do."""
    os.setsid()
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    torch.set_num_threads(1)
    sys.exit(main(arguments))


def runs(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize(
    ("number", "whole_group", "code"),
    [
        (signal.SIGTERM, True, 0),
        pytest.param(signal.SIGINT, True, 1, marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, False, -signal.SIGKILL, marks=pytest.mark.slow),
    ],
)
def test_no_worker_outlives_a_trainer_that_a_signal_ends(
    number: int, whole_group: bool, code: int, embedder: Path, tmp_path: Path
) -> None:
    if not Path("/proc/self/stat").exists():
        pytest.skip("processes are listed by /proc")
    config, run, log = tmp_path / "config.toml", tmp_path / "run", tmp_path / "log"
    config.write_text(CONFIG.format(run=run, model=embedder, data=SYNTHETIC / "en_sts.jsonl"))
    context = forkserver()
    arguments = [str(config), "train.steps=100000", "train.save_every=0", "data.workers=1"]
    process = context.Process(target=trainer, args=(str(log), arguments))
    process.start()
    try:
        fault_ranks.wait_until(lambda: (run / "metrics.jsonl").is_file(), [process], log)
        fault_ranks.wait_until(lambda: b"\n" in (run / "metrics.jsonl").read_bytes(), [process], log)
        children = list(map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()))
        if whole_group:  # which reaches the worker first
            os.kill(children[0], number)
            time.sleep(0.3)
            assert runs(children[0]) and process.is_alive(), log.read_text()
        (os.killpg if whole_group else os.kill)(process.pid, number)
        assert fault_ranks.ended([process], 30) == [code], log.read_text()
        deadline = time.monotonic() + 10
        while any(map(runs, children)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(children) == 1 and not any(map(runs, children))
    finally:
        process.kill()
        process.join()
    if number == signal.SIGTERM:
        step = steps_of(run)[-1]
        assert json.loads((run / "PREEMPTED").read_text()) == {"step": step} and step_folder(run, step).is_dir()
    assert not re.search("data worker|EOFError|BrokenPipe", log.read_text())
