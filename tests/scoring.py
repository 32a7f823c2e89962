"""What is scored without a model: encoders whose vectors are known, writers of tiny test sets; and a terminal."""

import json
import os
import pty
import re
import subprocess
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from e5core.testsets import EvalSet

ROOT = Path(__file__).parents[1]
DATA = ROOT / "data"


class WordEncoder:
    """Words (or what the pattern finds) hashed to signed axes, long ones heavier; keeps what it was asked."""

    def __init__(self, dim: int = 2048, pattern: str = r"\w+") -> None:
        self.dim, self.pattern = dim, pattern
        self.calls: list[tuple[list[str], str | None, bool]] = []

    def encode(self, texts: Sequence[str], task: str | None = None, normalize: bool = True) -> np.ndarray:
        self.calls.append((list(texts), task, normalize))
        vectors = np.zeros((len(texts), self.dim), dtype=np.float32)
        for row, text in enumerate(texts):
            for word in re.findall(self.pattern, text.lower()):
                code = zlib.crc32(word.encode())
                vectors[row, code % self.dim] += (1.0 if code & 2**31 else -1.0) * min(len(word), 8) ** 2
            vectors[row, 0] += 1e-3
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True) if normalize else vectors


class TableEncoder:
    """A vector per text, as written in the test."""

    def __init__(self, vectors: dict[str, Sequence[float]]) -> None:
        self.vectors = vectors

    def encode(self, texts: Sequence[str], task: str | None = None, normalize: bool = True) -> np.ndarray:
        found = np.array([self.vectors[text] for text in texts], dtype=np.float32)
        return found / np.linalg.norm(found, axis=1, keepdims=True) if normalize else found


def write_lines(path: Path, lines: Sequence[dict | str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines), encoding="utf-8")
    return path


def write_beir(folder: Path, documents: dict[str, str], queries: dict[str, str], judgements: Sequence[str]) -> Path:
    write_lines(folder / "corpus.jsonl", [{"_id": name, "title": "", "text": text} for name, text in documents.items()])
    write_lines(folder / "queries.jsonl", [{"_id": name, "text": text} for name, text in queries.items()])
    write_lines(folder / "qrels" / "test.tsv", ["query-id\tcorpus-id\tscore", *judgements])
    return folder


def write_pairs(path: Path, pairs: Sequence[tuple[str, str]], scores: Sequence[float] | None = None) -> Path:
    lines = [{"sentence1": first, "sentence2": second} for first, second in pairs]
    for line, score in zip(lines, scores or [], strict=False):
        line["score"] = score
    return write_lines(path, lines)


def retrieval(path: Path, **fields: object) -> EvalSet:
    return EvalSet(kind="retrieval", path=str(path), **fields)


def set_of(kind: str, folder: Path, lines: Sequence[dict], **fields: object) -> EvalSet:
    """Write a set of one test.jsonl.  Returns it."""
    return EvalSet(kind=kind, path=str(write_lines(folder / "test.jsonl", lines).parent), **fields)


def on_terminal(module: str, *arguments: str | Path) -> str:
    """Run a module's command line with stderr on a terminal of 80 columns.  Returns what it showed, without colours."""
    environment = {
        **os.environ,
        "COLUMNS": "80",
        "TERM": "xterm",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
    }
    command = [sys.executable, "-m", module, *map(str, arguments)]
    ours, theirs = pty.openpty()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=theirs, env=environment)
    os.close(theirs)
    raw = b""
    while chunk := _read(ours):
        raw += chunk
    os.close(ours)
    assert child.wait() == 0, raw.decode()
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", raw.decode())


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:  # Linux's answer when the other end of a pseudo-terminal is closed
        return b""
