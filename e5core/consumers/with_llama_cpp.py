"""Embed texts with llama.cpp (PyPI's xllamacpp), pooling and special tokens as the .gguf file says.

llama.cpp does not truncate: of a text that is too long it gets the ids.
"""

import json
import sys
import urllib.request
from pathlib import Path

import xllamacpp


def main(exported: str, request: str, answer: str) -> None:
    """Answer a request (see the package's docstring)."""
    asked = json.loads(Path(request).read_text(encoding="utf-8"))
    params = xllamacpp.CommonParams()
    params.model.path = exported
    params.embedding, params.warmup, params.verbosity = True, False, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.n_batch = params.n_ubatch = asked["max_tokens"]
    params.n_ctx = asked["max_tokens"] + 1  # the server wants room for one token more than a text has
    params.n_parallel = 1
    server = xllamacpp.Server(params)
    ids, vectors = [], []
    for text, ours in zip(asked["texts"], asked["ids"], strict=True):
        body = json.dumps({"content": text, "add_special": True, "parse_special": False}).encode()
        call = urllib.request.Request(
            f"{server.listening_address}/tokenize", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(call) as response:
            row = json.load(response)["tokens"]
        cut = len(row) > asked["max_tokens"]
        ids.append(ours if cut else row)
        told = server.handle_embeddings({"input": ours if cut else text, "model": "x"})
        if "data" not in told:
            raise RuntimeError(f"llama.cpp answers {json.dumps(told)[:300]} to a text of {len(ids[-1])} tokens")
        vectors.append(told["data"][0]["embedding"])
    Path(answer).write_text(json.dumps({"ids": ids, "vectors": vectors}), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
