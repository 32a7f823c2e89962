"""What a path to something trained means: its adapter or weights, the card of that, and the base model under it.

An adapter that others made, with PEFT, has no e5core.json: it is taken as one of the paper's, by the card that
find_card makes up for it.
"""

import hashlib
from dataclasses import asdict, replace
from pathlib import Path

from e5core.adapter import read_lora
from e5core.checkpoint import Card, read_best, read_card, step_folder, steps_of
from e5core.lora import LoraConfig
from e5core.template import SHAPES, template_of
from e5core.tokenizer import Tokenizer, TokenizerConfig
from e5core.weights import fingerprint, read_config, resolve_model

DEFAULT_MAX_TOKENS = 512  # paper, appendix A


def trained_folder(path: Path) -> Path | None:
    """Return the folder of the adapter, or of the trained weights, that `path` means; None where it means a model.

    A run stands for its best checkpoint where training kept one, else for its newest; a folder without a config.json
    for the adapter in its lora/. Raises FileNotFoundError for a run without a checkpoint.
    """
    if (path / "adapter_config.json").is_file() or (path / "e5core.json").is_file():
        return path
    if (path / "lora" / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        return path / "lora"
    if not (path / "config.toml").is_file():
        return None
    best, steps = read_best(path), steps_of(path)
    if not steps:
        raise FileNotFoundError(f"{path}: a run folder without a checkpoint; let it train to its first save")
    return step_folder(path, steps[-1] if best is None else best["step"])


def find_card(folder: Path, base: str | None = None) -> Card:
    """Read e5core.json of an adapter's folder, or make the card of an adapter that others made.

    base: where the base model lies, None: where the adapter says.
    Raises FileNotFoundError or ValueError.
    """
    if not (folder / "e5core.json").is_file():
        return _others_card(folder, base)
    card = read_card(folder)
    return card if base is None else replace(card, base_path=base)


def identity(model: str, base: str | None = None) -> str:
    """Hash the weights that a path means, and an adapter's (sha256, hex).  Raises as find_card does."""
    folder = trained_folder(Path(model))
    if folder is None:
        return fingerprint(resolve_model(model))
    return f"{find_card(folder, base).base_sha256}+{_digest(folder)}"


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in weight_files(folder) or [folder / "adapter_model.safetensors"]:
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def weight_files(folder: Path) -> list[Path]:
    """Return the files of all weights in the folder of a model that was trained whole; [] beside an adapter."""
    return sorted(folder.glob("weights_*.safetensors"))


def lora_of(card: Card) -> LoraConfig | None:
    """Return the [lora] table of a card; None where all weights were trained."""
    return None if card.lora is None else LoraConfig(**{**card.lora, "targets": tuple(card.lora["targets"])})


def check_base(folder: Path, card: Card) -> Path:
    """Find the base model of an adapter.  Returns its path.  Raises ValueError where the files are not those."""
    path = resolve_model(card.base_path)
    found = fingerprint(path)
    if found != card.base_sha256:
        raise ValueError(
            f"{path}: not the base model that {folder} was trained on: sha256 {found[:12]}..., expected "
            f"{card.base_sha256[:12]}..."
        )
    try:
        template_of(card.template)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    return path


def home_of(path: str) -> Path | None:
    """Return the folder that results about a model belong to: its run's, else its own; None where it is no folder."""
    own = Path(path)
    runs = (folder for folder in (own, own.parent) if (folder / "config.toml").is_file())
    return next(runs, own if own.is_dir() else None)


def revision_of(path: str) -> str:
    """Name the weights that `path` means, so that others have another name: step_140-7f3a0c5d9b21."""
    folder = trained_folder(Path(path))
    if folder is None:
        return fingerprint(resolve_model(path))[:12]
    return f"{folder.name}-{_digest(folder)[:12]}"


def _others_card(folder: Path, base: str | None) -> Card:
    lora, named = read_lora(folder)
    try:
        path = resolve_model(named if base is None else base)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{folder}: its base model is not at {named if base is None else base!r}: {error}; or say where it is "
            "(--base PATH, from Python base=PATH)"
        ) from error
    return Card(
        base_path=str(path.resolve()),
        base_sha256=fingerprint(path),
        causal=True,
        dtype="auto",
        max_tokens=min(DEFAULT_MAX_TOKENS, read_config(path).max_positions),
        lora=asdict(lora),
        tokenizer=asdict(TokenizerConfig()),
        tokenizer_contract=dict(Tokenizer.load(path).contract()),
        template=SHAPES["instruct"],
    )
