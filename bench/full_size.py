"""The real entry at full size (issue 6): python -m bench.full_size --work DIR [--device cuda] [--size 7b].

Writes a random Mistral of --size as a Hugging Face folder into DIR, tensor by tensor, with a tokenizer made of the
training records. Then by the commands that a user types: `torchrun -m e5core.train configs/e5_mistral_7b.toml` with a
batch of --batch for --steps steps; kill -9 of all its processes halfway; resume; export. metrics.jsonl must count every
step once, and the tokens/s of its steps stand beside those of bench.train_step's turn on the same records and model:
the medians must be within 5% (on a CPU, whose clock wanders, that is told and does not fail).
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.contest import median, run_module
from bench.models import SIZES, default_size, write_model
from bench.roofline import chosen_device, record, result_file
from e5core.config import load_config
from e5core.distributed import log
from e5core.mixture import load_mixture
from e5core.run import Config

CONFIG = Path("configs/e5_mistral_7b.toml")
CLOSE = 0.05


def main(argv: Sequence[str] | None = None) -> int:
    """Do it all.  Returns the exit status: 0 where everything held."""
    arguments = _parser().parse_args(argv)
    device = chosen_device(arguments.device)
    size, work, out = arguments.size or default_size(device), arguments.work, result_file(arguments.out, device)
    config = SIZES[size]
    config = replace(config, n_layers=arguments.layers or config.n_layers)
    row: dict[str, Any] = {"bench": "full_size", "size": size, "layers": config.n_layers, "batch": arguments.batch}
    started = time.monotonic()

    def tell(what: str, **values: object) -> None:
        record(row | {"what": what, "after_s": round(time.monotonic() - started, 1)} | values, device, out)

    epochs, texts = _training(arguments)
    folder, run = work / "model", work / "run"
    write_model(folder, config, torch.bfloat16, device, texts)
    tell("model written", gib=round(sum(p.stat().st_size for p in folder.iterdir()) / 2**30, 2))
    flags = _flags(arguments, folder, run, epochs)
    _killed_halfway(flags, run, arguments)
    tell("killed", steps=len(steps_of(run)))
    _module(["torch.distributed.run", *flags, "train.resume=true"], arguments.deadline)
    steps = steps_of(run)
    if steps != list(range(1, arguments.steps + 1)):
        raise RuntimeError(f"metrics.jsonl must count steps 1..{arguments.steps} once: got {steps}")
    rates = rates_of(run)
    tell("resumed and done", steps=len(steps), tokens_per_s=round(median(rates), 1))
    _module(["e5core.export", str(run), str(work / "export"), "--format", "peft"], arguments.deadline)
    tell("exported", files=sorted(path.name for path in (work / "export").iterdir()))
    bench = _bench(arguments, folder, device)
    ratio = median(rates) / bench
    is_close = abs(ratio - 1) <= CLOSE
    verdict = "pass" if is_close else "fail"
    tell("beside bench.train_step", bench_tokens_per_s=round(bench, 1), ratio=round(ratio, 4), verdict=verdict)
    if not arguments.keep:
        shutil.rmtree(folder)
    return int(not is_close and device.type == "cuda")


def _training(arguments: argparse.Namespace) -> tuple[float, list[str]]:
    """Return the epochs that make so many steps of the batch, and the texts that the tokenizer is made of."""
    config = load_config(Config, CONFIG)
    mixture, _ = load_mixture(config.data, config.train.seed)
    records = mixture.batch(0, mixture.epoch_size)
    texts = [text for record in records for text in (record.query, *record.positives, *record.negatives)]
    return (arguments.steps - 0.5) * arguments.batch / mixture.epoch_size, texts


def _flags(arguments: argparse.Namespace, folder: Path, run: Path, epochs: float) -> list[str]:
    flags = ["--standalone", "--nproc-per-node", "1", "-m", "e5core.train", str(CONFIG), f"backbone.path={folder}"]
    flags += [f"train.run={run}", f"train.epochs={epochs}", f"train.save_every={max(1, arguments.steps // 4)}"]
    flags += [f"batch.size={arguments.batch}", f"batch.micro_batch_tokens={arguments.micro_batch_tokens}"]
    flags += [f"{table}.max_tokens={arguments.max_tokens}" for table in ("batch", "eval")]
    return [*flags, *arguments.override]


def _killed_halfway(flags: list[str], run: Path, arguments: argparse.Namespace) -> None:
    """Start the run and kill -9 all its processes once half of the steps are told and a checkpoint is there."""
    if run.exists():
        shutil.rmtree(run)
    command = [sys.executable, "-m", "torch.distributed.run", *flags]
    with open(run.with_suffix(".log"), "w", encoding="utf-8") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
        deadline = time.monotonic() + arguments.deadline
        try:
            while len(steps_of(run)) < arguments.steps // 2 or not list(run.glob("step_*")):
                if process.poll() is not None or time.monotonic() > deadline:
                    output.flush()
                    tail = Path(output.name).read_text(encoding="utf-8")[-2000:]
                    raise RuntimeError(f"the run did not get halfway (status {process.poll()}):\n{tail}")
                time.sleep(0.05)
        finally:
            if process.poll() is None:
                _kill_tree(process.pid)
            process.wait()
    if len(steps_of(run)) >= arguments.steps:
        raise RuntimeError("the run was over before it was killed; raise --steps")


def _kill_tree(pid: int) -> None:
    """Send SIGKILL to a process and all that it started, and wait until they are gone, with their GPU's memory."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue  # it ended meanwhile
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    family, i = [pid], 0
    while i < len(family):
        family += children.get(family[i], [])
        i += 1
    for member in family:
        try:
            os.kill(member, signal.SIGKILL)
        except ProcessLookupError:
            pass
    while any(_is_running(member) for member in family):
        time.sleep(0.1)


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        return False


def _module(command: list[str], deadline: float) -> None:
    log(f"python -m {' '.join(command)}")
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, timeout=deadline)
    if done.returncode:
        raise RuntimeError(f"python -m {' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")


def _bench(arguments: argparse.Namespace, folder: Path, device: torch.device) -> float:
    """Return the tokens/s of bench.train_step's turn on the run's first batch."""
    flags = ["--turn", str(arguments.micro_batch_tokens), "--model", str(folder), "--config", str(CONFIG)]
    flags += ["--batch", str(arguments.batch), "--max-tokens", str(arguments.max_tokens), "--runs", "5"]
    turn = run_module(["bench.train_step", *flags, "--device", device.type, "--dtype", "bfloat16"], arguments.deadline)
    if isinstance(turn, str):
        raise RuntimeError(f"bench.train_step: {turn}")
    return turn["tokens"] / median(turn["seconds"])


def steps_of(run: Path) -> list[int]:
    """Return the steps that metrics.jsonl counts; a line that is being written is none yet."""
    return [line["step"] for line in _metrics(run)]


def rates_of(run: Path) -> list[float]:
    """Return tokens/s of every step but the first after a start: it compiles, and its allocator is empty."""
    lines = _metrics(run)
    usual = median([line["seconds"] for line in lines])
    return [line["tokens"] / line["seconds"] for line in lines if line["seconds"] <= 2 * usual]


def _metrics(run: Path) -> list[dict[str, Any]]:
    file = run / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="a folder with room for the model, 14 GiB for a 7b")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--size", choices=SIZES, help="default: 7b on CUDA, 135m on a CPU")
    parser.add_argument("--layers", type=int, help="in place of the size's own number")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--micro-batch-tokens", type=int, default=8192)
    parser.add_argument("--override", action="append", default=[], help="section.key=value, for e5core.train too")
    parser.add_argument("--deadline", type=float, default=400.0, help="seconds that one command may take")
    parser.add_argument("--keep", action="store_true", help="leave the model in DIR")
    parser.add_argument("--out", type=Path, help="JSON-lines file to append to (default: bench/results/DEVICE.jsonl)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
