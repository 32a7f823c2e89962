"""Texts, frozen ids and small files for the tokenizer tests and for the script that derives the ids again.

See data/tokenizer/README.md for where texts and ids come from.
"""

import importlib.util
import json
from pathlib import Path
from typing import Any

import gguf
import sentencepiece

from e5core.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "data" / "tokenizer"
NO_LIMIT = 10**9
RECORDS = [json.loads(line) for line in (FOLDER / "texts.jsonl").read_text(encoding="utf-8").rstrip("\n").split("\n")]
TEXTS = [record["text"] for record in RECORDS]
HARD = [record["text"] for record in RECORDS if record["source"] == "hand-written"]


def frozen(name: str) -> Any:
    """Return the content of data/tokenizer/NAME.json."""
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def package_file(package: str, name: str) -> Path | None:
    """Return a file of an installed package that need not be importable, None where the package is absent."""
    spec = importlib.util.find_spec(package)
    return None if spec is None or spec.origin is None else Path(spec.origin).parent / name


def write_json(path: Path, content: Any) -> None:
    """Write content as JSON."""
    path.write_text(json.dumps(content), encoding="utf-8")


def write_gguf(path: Path, fields: dict[str, Any]) -> Path:
    """Write a GGUF with tokenizer.ggml.* fields and no tensor; a field that is None is left out."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in fields.items():
        name = f"tokenizer.ggml.{key}"
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        elif value is not None:
            writer.add_array(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def text_ids(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Return the ids of the texts without BOS and EOS."""
    ids, n_truncated = tokenizer.encode_batch(texts, NO_LIMIT)
    assert n_truncated == 0
    front = tokenizer.bos_id is not None
    return [row[front:-1] for row in ids]


def sentencepiece_fields(model: sentencepiece.SentencePieceProcessor) -> dict[str, Any]:
    """Return the tokenizer.ggml.* fields of a sentencepiece model."""
    every = range(model.vocab_size())
    return {
        "model": "llama",
        "tokens": [model.id_to_piece(i) for i in every],
        "scores": [model.get_score(i) for i in every],
        "token_type": [_piece_type(model, i) for i in every],
    }


def _piece_type(model: sentencepiece.SentencePieceProcessor, token_id: int) -> int:
    if model.is_unknown(token_id):
        return gguf.TokenType.UNKNOWN
    if model.is_control(token_id):
        return gguf.TokenType.CONTROL
    return gguf.TokenType.BYTE if model.is_byte(token_id) else gguf.TokenType.NORMAL


def like_gemma(fields: dict[str, Any], more_tokens: list[str]) -> dict[str, Any]:
    """Return Mistral's fields as Gemma's are: no space in front, <unk> a control token, tokens that users defined.

    These are the runs of spaces, the end mark </s>, and more_tokens, which are added.
    """
    tokens = [
        token.replace("▁", " ") if token.strip("▁") == "" and len(token) > 1 else token for token in fields["tokens"]
    ]
    defined = {i for i, token in enumerate(tokens) if token.strip(" ") == "" or token == "</s>"}
    types = [gguf.TokenType.USER_DEFINED if i in defined else kind for i, kind in enumerate(fields["token_type"])]
    types[tokens.index("<unk>")] = gguf.TokenType.CONTROL
    return {
        "model": "llama",
        "tokens": tokens + more_tokens,
        "scores": fields["scores"] + [-1000.0] * len(more_tokens),
        "token_type": types + [gguf.TokenType.USER_DEFINED] * len(more_tokens),
        "unknown_token_id": tokens.index("<unk>"),
        "add_space_prefix": False,
    }
