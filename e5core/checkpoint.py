"""A run's folder on disk: RUN/step_N/ with adapter, optimizer and cursor; whole or not there.

    step_N/adapter_config.json, adapter_model.safetensors    PEFT's layout, fp32
    step_N/e5core.json                                       what an encoder needs to know: base model by path and hash,
                                                             tokenization contract, template, dtype, length
    step_N/golden.npy                                        embeddings of GOLDEN_TEXTS by this checkpoint
    step_N/optimizer.safetensors, state.json                 to go on: moments, step, mixture's state, best so far
    best.json                                                {"step", "metric", "value"}

A step folder is written under a temporary name, flushed to the disk and renamed, so that a kill or a full disk at any
moment leaves the previous one whole. There is no random state to keep: batches and dropout are functions of seed and
step.
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from e5core.adapter import read_adapter, write_adapter
from e5core.config import read_json
from e5core.encoder import EmbeddingModel
from e5core.lora import LoraConfig
from e5core.optim import AdamW

_PREFIX = "step_"


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """What an encoder must know beside the adapter (e5core.json)."""

    base_path: str
    base_sha256: str
    causal: bool
    dtype: str
    max_tokens: int
    lora: dict[str, Any]  # the [lora] table
    tokenizer: dict[str, Any]  # the [tokenizer] table
    tokenizer_contract: dict[str, Any]
    template: str


def save(
    run: Path,
    step: int,
    model: EmbeddingModel,
    lora: LoraConfig,
    card: Card,
    golden: np.ndarray,
    optimizer: AdamW,
    data: Mapping[str, Any],
    best: dict[str, Any] | None,
) -> Path:
    """Write RUN/step_N; data is the mixture's state().

    Raises OSError where the disk refuses; then nothing of it is left behind.
    """
    final, partial = run / f"{_PREFIX}{step}", run / f".partial_{_PREFIX}{step}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        write_adapter(partial, model.backbone, lora, card.base_path)
        _write_json(partial / "e5core.json", asdict(card))
        np.save(partial / "golden.npy", golden, allow_pickle=False)
        save_file(optimizer.state(), partial / "optimizer.safetensors")
        _write_json(partial / "state.json", {"step": step, "n_updates": optimizer.n_updates, **data, "best": best})
        for file in partial.iterdir():
            _flush(file)
        _flush(partial)
        shutil.rmtree(final, ignore_errors=True)
        os.rename(partial, final)
        _flush(run)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(
            f"could not save {final}: {error}; earlier checkpoints in {run} are whole: make room and go on with "
            "train.resume=true"
        ) from error
    return final


def steps_of(run: Path) -> list[int]:
    """Return the numbers of the whole checkpoints in a run folder, rising."""
    found = (p.name.removeprefix(_PREFIX) for p in run.glob(f"{_PREFIX}*") if (p / "state.json").is_file())
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
) -> dict[str, Any] | None:
    """Fill model and optimizer from a step folder.  Returns the best checkpoint's record as it was then.

    Raises ValueError where the folder is of another base model, tokenizer or other data, or damaged.
    """
    state, stored = read_json(folder / "state.json"), read_card(folder)
    for field in ("base_sha256", "tokenizer_contract", "template"):
        was, now = asdict(stored)[field], asdict(card)[field]
        if was != now:
            raise ValueError(f"{folder}: {field} was {was}, is {now}; put the model's files back or start a new run")
    if state["data"] != data_digest:
        raise ValueError(
            f"{folder}: the training records have changed since this checkpoint, so the run cannot go on as it was; "
            "put the files back, or start a new run with another train.run"
        )
    read_adapter(folder, model.backbone)
    try:
        moments = load_file(folder / "optimizer.safetensors")
    except SafetensorError as error:
        raise ValueError(f"{folder}: optimizer.safetensors is damaged ({error}); delete {folder.name}") from error
    optimizer.load_state(moments, state["n_updates"])
    return state["best"]


def prune(run: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints and the best one."""
    best = read_best(run)
    kept = {*steps_of(run)[-keep:], *([] if best is None else [best["step"]])}
    for step in set(steps_of(run)) - kept:  # renamed first: half a deletion must not look like a checkpoint
        os.rename(step_folder(run, step), run / f".partial_{_PREFIX}{step}")
    for leftover in run.glob(f".partial_{_PREFIX}*"):
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
    """Return {"step", "metric", "value"} of the best checkpoint, or None."""
    file = run / "best.json"
    return read_json(file) if file.is_file() else None


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file under a temporary name and rename it."""
    partial = path.with_name(f".partial_{path.name}")
    try:
        _write_json(partial, value)
        _flush(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
