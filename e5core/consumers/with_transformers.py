"""Embed texts with transformers: AutoTokenizer and AutoModel, the last token's hidden state."""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer


def main(exported: str, request: str, answer: str) -> None:
    """Answer a request (see the package's docstring)."""
    asked = json.loads(Path(request).read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(exported)
    model = AutoModel.from_pretrained(exported, dtype=torch.float32).eval()
    ids = [tokenizer(text, truncation=True, max_length=asked["max_tokens"])["input_ids"] for text in asked["texts"]]
    with torch.no_grad():
        vectors = [model(input_ids=torch.tensor([row])).last_hidden_state[0, -1].tolist() for row in ids]
    Path(answer).write_text(json.dumps({"ids": ids, "vectors": vectors}), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
