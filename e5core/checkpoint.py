"""A run's folder on disk: RUN/step_N/ with adapter, optimizer and cursor; whole or not there.

    step_N/adapter_config.json, adapter_model.safetensors    PEFT's layout, fp32
    step_N/weights_R_of_W.safetensors                        instead of these, where all weights are trained: rank R's
                                                             part of them in fp32, by our names (stretches.py)
    step_N/e5core.json                                       what an encoder needs to know: base model by path and hash,
                                                             tokenization contract, template, dtype, length
    step_N/golden.npy                                        embeddings of GOLDEN_TEXTS by this checkpoint
    step_N/optimizer_R_of_W.safetensors                      rank R's part of the moments
    step_N/state.json                                        to go on: step, updates, mixture's state, best so far, and
                                                             the step's metrics where SIGTERM cut its evaluation off
    step_N/manifest.json                                     size and sha256 of all these, and its own
    best.json                                                {"step", "metric", "value"}

Every rank writes its own part into a hidden folder and flushes it to the disk; when all parts are there, rank 0 writes
the manifest last and renames the folder (saving.py). So a kill or a full disk at any moment leaves the previous one
whole. Any number of ranks reads what any number wrote: each takes the stretches that it holds. There is no random state
to keep: batches and dropout are functions of seed and step.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from e5core.adapter import read_adapter
from e5core.config import read_json
from e5core.distributed import World, check_same, share
from e5core.encoder import EmbeddingModel, Pooling
from e5core.optim import AdamW
from e5core.sharding import Slice
from e5core.stretches import Stretches

_PREFIX = "step_"
_MANIFEST = "manifest.json"
PARTIAL = ".partial_step_"  # being written
_DOOMED = ".old_step_"  # being deleted
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
CARD_FILES = ("e5core.json", "golden.npy")  # beside what is trained; an encoder needs no more
_STATE = "state.json"
_OPTIMIZER = "optimizer"


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """What an encoder must know beside the adapter (e5core.json)."""

    base_path: str
    base_sha256: str
    causal: bool
    dtype: str
    max_tokens: int
    lora: dict[str, Any] | None  # the [lora] table; None: all weights were trained
    tokenizer: dict[str, Any]  # the [tokenizer] table
    tokenizer_contract: dict[str, Any]
    template: str
    pooling: Pooling = "last"
    frozen_dtype: str = "same"
    fp8_skip: list[str] = field(default_factory=list)


def read_parts(folder: Path, kind: str, wanted: Mapping[str, Slice]) -> None:
    """Fill slices from the parts of one kind, "weights" or "optimizer", that any number of ranks wrote.

    Raises ValueError where they are of another model or of other LoRA targets.
    """
    stored = Stretches(folder.glob(f"{kind}_*.safetensors"))
    whole = [stored.fill(name, into) for name, into in wanted.items()]
    if not all(whole) or stored.shapes.keys() != wanted.keys():
        raise ValueError(
            f"{folder}: its {kind} parts are of another model or of other LoRA targets; give the config that they "
            "were written with, or start a new run with another train.run"
        )


def describe_files(paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Return what a manifest says of files: {name: {"bytes", "sha256"}}; flushes each to the disk first."""
    described = {}
    for path in paths:
        flush(path)
        described[path.name] = {"bytes": path.stat().st_size, "sha256": _digest(path)}
    return described


def write_manifest(folder: Path, step: int, world_size: int, files: Mapping[str, Any]) -> None:
    """Write the file that makes a checkpoint whole, the last of its files."""
    said = {"step": step, "world_size": world_size, "files": dict(sorted(files.items()))}
    write_json(folder / _MANIFEST, said | {"sha256": _digest_of(said)})


def check_newest(run: Path, world: World) -> None:
    """Hold the files of the newest checkpoint, if there is one, against its manifest; the ranks share the work.

    Raises ValueError on every rank, naming what is missing or damaged and how to go on from the checkpoint before.
    """
    steps = steps_of(run)
    check_same({f"checkpoints in {run}": steps}, world)
    folders = (path for path in run.glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdigit())
    if unsealed := sorted(path for path in folders if not (path / _MANIFEST).is_file()):
        raise ValueError(
            f"{unsealed[0]}: no {_MANIFEST}, so nobody can tell whether it is whole (files were deleted, or "
            "another version of e5core wrote it); move this folder away and give train.resume=true again"
        )
    if steps:
        folder = step_folder(run, steps[-1])
        names = sorted(_read_manifest(folder)["files"])
        own = _faults(folder, names[world.rank :: world.world_size])
        if faults := [fault for faults in share(own, world) for fault in faults]:
            raise _damage(folder, faults)


def check_files(folder: Path) -> None:
    """Hold what an encoder reads of a checkpoint, where it has a manifest, against it.

    Raises ValueError as check_newest does.
    """
    if not (folder / _MANIFEST).is_file():
        return
    names = (n for n in _read_manifest(folder)["files"] if n != _STATE and not n.startswith(_OPTIMIZER))
    if faults := _faults(folder, names):
        raise _damage(folder, faults)


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        said = read_json(folder / _MANIFEST)
        if said.pop("sha256") != _digest_of(said):
            raise ValueError("its sha256 is another than when it was written")
    except (ValueError, KeyError) as error:  # whatever flipped bits make of it
        raise _damage(folder, [f"{_MANIFEST} is damaged ({error})"]) from error
    return said


def _faults(folder: Path, names: Iterable[str]) -> list[str]:
    files, faults = _read_manifest(folder)["files"], []
    for name in names:
        path = folder / name
        if not path.is_file():
            faults.append(f"{name} is missing")
        elif path.stat().st_size != files[name]["bytes"]:
            faults.append(f"{name} has {path.stat().st_size:,} bytes, not {files[name]['bytes']:,}")
        elif _digest(path) != files[name]["sha256"]:
            faults.append(f"{name} is damaged: its sha256 is another than when it was written")
    return faults


def _damage(folder: Path, faults: list[str]) -> ValueError:
    earlier = [step for step in steps_of(folder.parent) if f"{_PREFIX}{step}" != folder.name]
    way = f"go on from {_PREFIX}{earlier[-1]} with train.resume=true" if earlier else "begin anew: train.overwrite=true"
    return ValueError(f"{folder}: {'; '.join(faults)}; delete this folder (rm -r {folder}) and {way}")


def steps_of(run: Path) -> list[int]:
    """Return the numbers of the checkpoints in a run folder that have a manifest, rising."""
    found = (p.name.removeprefix(_PREFIX) for p in run.glob(f"{_PREFIX}*") if (p / _MANIFEST).is_file())
    return sorted(int(number) for number in found if number.isdigit())


def begun_epochs(run: Path) -> list[list[dict[str, Any]]]:
    """Return the "epochs" of the mixture's state() in the newest checkpoint; none where there is no checkpoint."""
    steps = steps_of(run)
    return read_json(step_folder(run, steps[-1]) / "state.json").get("epochs", []) if steps else []


def step_folder(run: Path, step: int) -> Path:
    """Return the folder of a checkpoint."""
    return run / f"{_PREFIX}{step}"


def restore(
    folder: Path, model: EmbeddingModel, optimizer: AdamW, data_digest: str, card: Card
) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Fill model and optimizer from a step folder that check_newest passed.

    Returns the record of the best checkpoint as of then, None where there was none, or it is gone; and the step's line
    for metrics.jsonl where its evaluation was cut off, which is still to come.
    Raises ValueError where the folder is of another base model, LoRA, tokenizer or other data.
    """
    state, stored, own = read_json(folder / "state.json"), read_card(folder), json.loads(json.dumps(asdict(card)))
    for key in ("base_sha256", "tokenizer_contract", "template", "causal", "pooling", "lora"):
        was, now = asdict(stored)[key], own[key]
        if was != now:
            raise ValueError(f"{folder}: {key} was {was}, is {now}; put the model's files back or start a new run")
    if state["data"] != data_digest:
        raise ValueError(
            f"{folder}: the training records have changed since this checkpoint, so the run cannot go on as it was; "
            "put the files back, or start a new run with another train.run"
        )
    read_trained(folder, model)
    read_parts(folder, _OPTIMIZER, optimizer.state())
    optimizer.n_updates = state["n_updates"]
    best = state["best"]
    is_there = best is not None and best["step"] in steps_of(folder.parent)
    return best if is_there else None, state.get("unevaluated")


def read_trained(folder: Path, model: EmbeddingModel) -> None:
    """Fill what a model trains, adapters or all of its weights.  Raises what read_adapter or read_parts raises."""
    if not model.full:
        read_adapter(folder, model.backbone, model.put)
        return
    model.shards.release()
    read_parts(folder, "weights", model.slices())


def prune(run: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints and the best one."""
    best = read_best(run)
    kept = {*steps_of(run)[-keep:], *([] if best is None else [best["step"]])}
    for step in set(steps_of(run)) - kept:  # renamed first: half a deletion must not look like a checkpoint
        os.rename(step_folder(run, step), run / f"{_DOOMED}{step}")
        shutil.rmtree(run / f"{_DOOMED}{step}")


def clean(run: Path) -> None:
    """Delete what a killed run left half written or half deleted; no rank may be saving."""
    for name in (PARTIAL, _DOOMED):
        for leftover in run.glob(f"{name}*"):
            shutil.rmtree(leftover)


def read_card(folder: Path) -> Card:
    """Read e5core.json of a step folder.  Raises FileNotFoundError or ValueError."""
    file = folder / "e5core.json"
    if not file.is_file():
        raise FileNotFoundError(f"{folder}: no e5core.json; this is no adapter that e5core saved")
    try:
        return Card(**read_json(file))
    except TypeError as error:
        raise ValueError(f"{file}: of another version of e5core ({error})") from error


def read_best(run: Path) -> dict[str, Any] | None:
    """Return {"step", "metric", "value"} of the best checkpoint, or None, also where that is gone."""
    file = run / "best.json"
    best = read_json(file) if file.is_file() else None
    return None if best is None or best["step"] not in steps_of(run) else best


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file under a temporary name and rename it."""
    partial = path.with_name(f".partial_{path.name}")
    try:
        _write_json(partial, value)
        flush(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def flush(path: Path) -> None:
    """See to it that a file or a folder's entries are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_of(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
