"""Texts to vectors: `python -m e5core.encode MODEL --input TEXTS.jsonl --output V.npy`, and Encoder for Python.

MODEL is a run folder (its best checkpoint where training kept one, else the newest), a checkpoint folder RUN/step_N, a
Hugging Face folder or a .gguf file (an untrained model). `--selfcheck` embeds ten fixed texts and holds them against
the vectors that training stored, so that a changed library, file or machine shows before a million texts are encoded.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import cast

import numpy as np
import torch

from e5core.batches import document_text, pack, query_text
from e5core.checkpoint import Card, read_best, read_card, step_folder, steps_of
from e5core.distributed import log, start
from e5core.encoder import Dtype, EmbeddingModel, build_model, choose_dtype
from e5core.lora import LoraConfig
from e5core.tokenizer import Tokenizer, TokenizerConfig
from e5core.weights import fingerprint, read_adapter, resolve_model

TEMPLATE = query_text("{task}", "{query}")
DEFAULT_MAX_TOKENS = 512  # paper, appendix A
# Short, long, empty and non-Latin texts; a pair is (task, text).
GOLDEN_TEXTS: tuple[tuple[str | None, str], ...] = (
    (None, ""),
    (None, "a"),
    (None, "The quick brown fox jumps over the lazy dog."),
    ("Retrieve semantically similar text.", "A man is playing a guitar."),
    ("Given a web search query, retrieve relevant passages that answer the query", "how do vaccines work"),
    (None, "Vaccines train the immune system by showing it a harmless part of a germ. " * 8),
    (None, "Die Straßenbahn fährt alle zehn Minuten."),
    (None, "猫が窓辺で眠っている。"),
    (None, "def add(a, b):\n    return a + b\n"),
    ("Retrieve parallel sentences.", "Быстрая лиса перепрыгнула через забор 🦊"),
)


class Encoder:
    """A model, its tokenizer and its template: texts in, unit vectors out."""

    def __init__(
        self,
        model: EmbeddingModel,
        tokenizer: Tokenizer,
        device: torch.device,
        max_tokens: int,
        batch_tokens: int = 4096,
    ) -> None:
        self.model, self.tokenizer, self.device = model, tokenizer, device
        self.max_tokens, self.batch_tokens = max_tokens, batch_tokens
        self.n_truncated = 0  # texts cut to max_tokens so far
        self.golden: np.ndarray | None = None  # vectors of GOLDEN_TEXTS stored with the model

    @classmethod
    def load(cls, model: str, *, max_tokens: int | None = None, dtype: Dtype = "auto") -> "Encoder":
        """Load a run folder, a checkpoint, a Hugging Face folder or a .gguf file.

        max_tokens, dtype: None and "auto" mean what the run was trained with; else 512, and the faster of two.
        Raises FileNotFoundError or ValueError that says what is missing or does not fit.
        """
        folder = _adapter_folder(Path(model))
        device = start().device
        if folder is None:
            path = resolve_model(model)
            chosen, _ = choose_dtype(dtype, device)
            built = build_model(path, chosen, device, causal=True, lora=None, seed=0)
            return cls(built, Tokenizer.load(path), device, max_tokens or DEFAULT_MAX_TOKENS)
        card = read_card(folder)
        path = resolve_model(card.base_path)
        found = fingerprint(path)
        if found != card.base_sha256:
            raise ValueError(
                f"{path}: not the base model that {folder} was trained on: sha256 {found[:12]}..., expected "
                f"{card.base_sha256[:12]}..."
            )
        tokenizer = Tokenizer.load(path, TokenizerConfig(**card.tokenizer))
        tokenizer.check_contract(card.tokenizer_contract)
        chosen, _ = choose_dtype(cast(Dtype, card.dtype) if dtype == "auto" else dtype, device)
        encoder = cls(
            _with_adapter(path, folder, card, chosen, device), tokenizer, device, max_tokens or card.max_tokens
        )
        encoder.golden = np.load(folder / "golden.npy", allow_pickle=False)
        return encoder

    def encode(self, texts: Sequence[str], task: str | None = None, normalize: bool = True) -> np.ndarray:
        """Embed texts.  task: the instruction of queries (and of both sides in symmetric tasks); None for documents.

        Returns (n, dim) float32 in the order of the texts, unit rows unless `normalize` is false.
        Raises FloatingPointError where an embedding is not finite.
        """
        formatted = [query_text(task, text) if task else document_text(text) for text in texts]
        sequences, truncated = self.tokenizer.encode_batch(formatted, self.max_tokens)
        self.n_truncated += truncated
        vectors = np.empty((len(texts), self.model.backbone.config.dim), dtype=np.float32)
        with torch.inference_mode():
            for batch in pack(sequences, self.batch_tokens, self.device):
                vectors[batch.rows.cpu().numpy()] = self.model(batch, normalize=normalize).float().cpu().numpy()
        broken = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
        if len(broken):
            raise FloatingPointError(f"the embedding of text {broken[0]} is not finite ({texts[broken[0]][:80]!r})")
        return vectors

    def golden_vectors(self) -> np.ndarray:
        """Embed GOLDEN_TEXTS.  Returns (10, dim) float32."""
        return np.concatenate([self.encode([text], task) for task, text in GOLDEN_TEXTS])

    def selfcheck(self) -> float:
        """Embed GOLDEN_TEXTS again.  Returns the lowest cosine to the stored vectors.

        Raises ValueError for a model without stored vectors.
        """
        if self.golden is None:
            raise ValueError("this model has no golden vectors; only what e5core trained can be checked")
        return float((self.golden_vectors() * self.golden).sum(axis=1).min())


def _adapter_folder(path: Path) -> Path | None:
    if (path / "adapter_config.json").is_file():
        return path
    if not (path / "config.toml").is_file():
        return None
    best, steps = read_best(path), steps_of(path)
    if not steps:
        raise FileNotFoundError(f"{path}: a run folder without a checkpoint; let it train to its first save")
    return step_folder(path, steps[-1] if best is None else best["step"])


def _with_adapter(path: Path, folder: Path, card: Card, dtype: torch.dtype, device: torch.device) -> EmbeddingModel:
    lora = LoraConfig(**{**card.lora, "targets": tuple(card.lora["targets"])})
    model = build_model(path, dtype, device, causal=card.causal, lora=lora, seed=0)
    read_adapter(folder, model.backbone)
    return model


def read_texts(path: Path) -> Iterator[str]:
    """Yield the text of every line of a JSON-lines file: `text`, with `title` and a space before it where there is one.

    Raises ValueError naming file and line.
    """
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number}: not JSON ({error.msg} at column {error.colno})") from error
            if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                raise ValueError(f'{path}:{number}: every line must be an object with a string "text"')
            yield f"{row.get('title') or ''} {row['text']}".strip()


def encode_file(encoder: Encoder, source: Path, output: Path, task: str | None, chunk: int = 2048) -> int:
    """Encode a file of texts into a .npy of (n, dim) float32, in memory that does not grow with n.  Returns n."""
    n_texts = sum(1 for _ in read_texts(source))
    if n_texts == 0:
        raise ValueError(f"{source}: no text in it")
    partial = output.with_name(f".partial_{output.name}")
    shape = (n_texts, encoder.model.backbone.config.dim)
    try:
        vectors = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float32, shape=shape)
        texts, done = read_texts(source), 0
        while piece := list(islice(texts, chunk)):
            vectors[done : done + len(piece)] = encoder.encode(piece, task)
            done += len(piece)
            log(f"encoded {done:,} of {n_texts:,} texts")
        vectors.flush()
        partial.replace(output)
    finally:
        partial.unlink(missing_ok=True)
    return n_texts


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.  Returns the exit status: 0, 1 for a failed selfcheck, 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m e5core.encode", description=__doc__.split("\n\n")[0])
    parser.add_argument("model", help="run folder, checkpoint folder, Hugging Face folder or .gguf file")
    parser.add_argument("--input", type=Path, help='JSON lines with a "text" each')
    parser.add_argument("--output", type=Path, help=".npy file to write, (n, dim) float32, unit rows")
    parser.add_argument("--task", help="instruction, for queries; documents have none")
    parser.add_argument("--max-tokens", type=int, help="cut texts to this many tokens (default: the run's, else 512)")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--selfcheck", action="store_true", help="compare with the vectors stored by the training run")
    arguments = parser.parse_args(argv)
    if not arguments.selfcheck and (arguments.input is None or arguments.output is None):
        parser.error("--input and --output are needed (or --selfcheck)")
    try:
        encoder = Encoder.load(arguments.model, max_tokens=arguments.max_tokens, dtype=arguments.dtype)
        log(encoder.tokenizer.describe())
        if arguments.selfcheck and not _selfcheck(encoder):
            return 1
        if arguments.input is not None:
            n_texts = encode_file(encoder, arguments.input, arguments.output, arguments.task)
            log(f"wrote {arguments.output}: {n_texts:,} vectors; {encoder.n_truncated:,} texts were truncated")
    except (ValueError, OSError, FloatingPointError) as error:
        log(f"e5core.encode: {error}")
        return 2
    return 0


def _selfcheck(encoder: Encoder) -> bool:
    bf16 = next(encoder.model.parameters()).dtype == torch.bfloat16
    least, allowed = encoder.selfcheck(), 0.999 if bf16 else 0.99999
    passed = least >= allowed
    verdict = "passed" if passed else "FAILED"
    log(f"selfcheck {verdict}: lowest cosine {least:.7f} to the stored vectors, allowed {allowed}")
    return passed


if __name__ == "__main__":
    sys.exit(main())
