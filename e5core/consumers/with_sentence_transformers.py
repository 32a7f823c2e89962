"""Embed texts with sentence-transformers, as one batch of mixed lengths."""

import json
import sys
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer


def main(exported: str, request: str, answer: str) -> None:
    """Answer a request (see the package's docstring)."""
    asked = json.loads(Path(request).read_text(encoding="utf-8"))
    model = SentenceTransformer(exported, device="cpu", model_kwargs={"dtype": torch.float32})
    ids = [model.tokenize([text])["input_ids"][0].tolist() for text in asked["texts"]]
    vectors = model.encode(asked["texts"], batch_size=len(ids)).tolist()
    Path(answer).write_text(json.dumps({"ids": ids, "vectors": vectors}), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
