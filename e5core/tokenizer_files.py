"""A tokenizer as others read it: Hugging Face's tokenizer.json, and the metadata of a .gguf file.

transformers 5 no longer obeys add_bos_token and add_eos_token (mteb #5237), so that embeddings would be read from a
token of the text. Here tokenizer.json's own post-processor puts both, which every version obeys, and the class is named
that takes the file as it is. llama.cpp obeys its add_bos_token and add_eos_token.

Ours takes strings that look like control tokens ("</s>") for text, transformers and llama.cpp's server take them for
those tokens: the formats have no word for it.
"""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers

from e5core.config import read_json
from e5core.gguf_file import read_gguf_metadata
from e5core.gguf_tokenizer import PRE_TOKENIZERS, byte_pair
from e5core.tokenizer import Tokenizer

_PREFIX = "tokenizer.ggml."
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5  # tokenizer.ggml.token_type, sentencepiece's types
_SPACE = "▁"
# Where the pre-tokenizers that we know differ: contractions, digits, runs of spaces, line ends, marks, normal forms.
_PROBES = (
    "It's WE'LL don’t 1234567 a1b22 3.14159", "a  b   c\n\n  d \n\te\r\nf", "x=(y+1)*$2; «z» --- ...!?", "e\u0301 ﬁ Å",
    "Die Straßenbahn fährt alle 10 Minuten.", "猫が窓辺で眠っている。", "def add(a, b):\n    return a + b\n", "🦊 прыг",
)  # fmt: skip


def write_hf_tokenizer(folder: Path, tokenizer: Tokenizer, source: Path, max_tokens: int) -> None:
    """Write tokenizer.json and tokenizer_config.json (and tokenizer.model where the model is sentencepiece's).

    source: the model that the tokenizer was loaded from; its own tokenizer.json is taken where there is one.
    """
    content = _content(tokenizer, source)
    bos, eos = (
        None if tokenizer.bos_id is None else tokenizer.piece(tokenizer.bos_id),
        tokenizer.piece(tokenizer.eos_id),
    )
    ids = {eos: tokenizer.eos_id} | ({} if bos is None else {bos: tokenizer.bos_id})
    front = [] if bos is None else [{"SpecialToken": {"id": bos, "type_id": 0}}]
    back = [{"SpecialToken": {"id": eos, "type_id": 0}}]
    first, second = ({"Sequence": {"id": letter, "type_id": 0}} for letter in "AB")
    content |= {
        "truncation": None,
        "padding": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [*front, first, *back],
            "pair": [*front, first, *back, second, *back],
            "special_tokens": {piece: {"id": piece, "ids": [i], "tokens": [piece]} for piece, i in ids.items()},
        },
    }
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": eos,  # never read: attention masks say what is padding
        "add_bos_token": bos is not None,
        "add_eos_token": True,
        "padding_side": "right",
        "model_max_length": max_tokens,
        "clean_up_tokenization_spaces": False,
    }
    _write(folder / "tokenizer.json", content)
    _write(folder / "tokenizer_config.json", {key: value for key, value in described.items() if value is not None})
    if isinstance(tokenizer.library, sentencepiece.SentencePieceProcessor):
        (folder / "tokenizer.model").write_bytes(tokenizer.library.serialized_model_proto())


def gguf_tokenizer(tokenizer: Tokenizer, source: Path, n_rows: int) -> dict[str, Any]:
    """Return the metadata of a .gguf file that describe the tokenizer.

    source: as in write_hf_tokenizer.  n_rows: of the embedding; llama.cpp wants a token for each.
    Raises ValueError for a byte-level BPE that splits words as none that we know.
    """
    if source.suffix == ".gguf":
        fields = read_gguf_metadata(source, _PREFIX)
        fields = {key.removeprefix(_PREFIX): value for key, value in fields.items()}
    elif isinstance(tokenizer.library, sentencepiece.SentencePieceProcessor):
        fields = _sentencepiece_fields(tokenizer.library)
    else:
        fields = _byte_pair_fields(tokenizer.library, tokenizer.vocab_size, source)
    missing = n_rows - len(fields["tokens"])
    more = {
        "tokens": [f"[PAD{i}]" for i in range(missing)],
        "token_type": [_UNUSED] * missing,
        "scores": [0.0] * missing,
    }
    fields |= {key: fields[key] + values for key, values in more.items() if key in fields}
    fields |= {"eos_token_id": tokenizer.eos_id, "add_eos_token": True, "add_bos_token": tokenizer.bos_id is not None}
    if tokenizer.bos_id is not None:
        fields["bos_token_id"] = tokenizer.bos_id
    return {_PREFIX + key: value for key, value in fields.items()}


def _content(tokenizer: Tokenizer, source: Path) -> dict[str, Any]:
    if (source / "tokenizer.json").is_file():
        return read_json(source / "tokenizer.json")
    if isinstance(tokenizer.library, tokenizers.Tokenizer):
        return json.loads(tokenizer.library.to_str())
    return _converted(tokenizer.library)


def _converted(model: sentencepiece.SentencePieceProcessor) -> dict[str, Any]:
    """Express a sentencepiece BPE by merges: a pair merges the sooner, the higher the score of what it gives."""
    fields = _sentencepiece_fields(model)
    pieces, types = [_escaped(piece) for piece in fields["tokens"]], fields["token_type"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    runs = {
        piece for piece, kind in zip(pieces, types, strict=True) if kind == _USER_DEFINED and not piece.strip(_SPACE)
    }
    merges = []
    for piece, score, kind in zip(pieces, fields["scores"], types, strict=True):
        if kind == _NORMAL or piece in runs:
            pairs = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
            first = -float("inf") if piece in runs else -score  # what users define is found before all merges
            merges += [(first, len(piece), pair) for pair in pairs if pair[0] in vocab and pair[1] in vocab]
    spaced = [{"type": "Prepend", "prepend": _SPACE}] if fields["add_space_prefix"] else []
    added = [
        {"id": i, "content": piece, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": types[i] != _USER_DEFINED}
        for piece, i in vocab.items()
        if types[i] in (_UNKNOWN, _CONTROL, _USER_DEFINED) and piece not in runs
    ]  # fmt: skip
    replaced = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    return {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": [*spaced, replaced]},
        "pre_tokenizer": None,
        "decoder": None,
        "model": {
            "type": "BPE",
            "unk_token": next((piece for piece, i in vocab.items() if types[i] == _UNKNOWN), None),
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocab,
            "merges": [list(pair) for _, _, pair in sorted(merges, key=lambda merge: merge[:2])],
        },
    }


def _escaped(piece: str) -> str:
    return piece if piece.strip(" ") else piece.replace(" ", _SPACE)


def _byte_pair_fields(model: tokenizers.Tokenizer, n_tokens: int, source: Path) -> dict[str, Any]:
    content = json.loads(model.to_str())
    tokens, types = [f"[PAD{i}]" for i in range(n_tokens)], [_UNUSED] * n_tokens
    for token, i in content["model"]["vocab"].items():
        tokens[i], types[i] = token, _NORMAL
    for added in content["added_tokens"]:
        i = added["id"]
        tokens[i], types[i] = added["content"], _CONTROL if added["special"] else _USER_DEFINED
    merges = [" ".join(merge) for merge in content["model"]["merges"]]
    fields = {"model": "gpt2", "tokens": tokens, "token_type": types, "merges": merges}
    wanted = [model.encode(probe, add_special_tokens=False).ids for probe in _PROBES]
    # Of those that a vocabulary cannot tell apart, the one that cuts more comes first.
    for pre in sorted(PRE_TOKENIZERS, key=("default", "gpt-2").__contains__):
        candidate = byte_pair(source, fields | {"pre": pre})
        candidate.encode_special_tokens = True
        if [candidate.encode(probe, add_special_tokens=False).ids for probe in _PROBES] == wanted:
            return fields | {"pre": pre}
    raise ValueError(
        f"{source}: its tokenizer splits words as none of {', '.join(PRE_TOKENIZERS)}, the pre-tokenizers of llama.cpp "
        "that are known here; export merged, and convert that with llama.cpp's convert_hf_to_gguf.py"
    )


def _sentencepiece_fields(model: sentencepiece.SentencePieceProcessor) -> dict[str, Any]:
    """Read pieces, scores and types out of the ModelProto: the library has no question for user-defined pieces."""
    tokens, scores, types, prefix = [], [], [], True
    for number, value in _proto(model.serialized_model_proto()):
        fields = dict(_proto(value)) if number in (1, 3) and isinstance(value, bytes) else {}
        if number == 1:
            token, kind = fields[1].decode(), int(fields.get(3, _NORMAL))
            # llama.cpp's converter writes runs of spaces as such where users defined them.
            run = kind == _USER_DEFINED and not token.strip(_SPACE)
            tokens.append(token.replace(_SPACE, " ") if run else token)
            scores.append(struct.unpack("<f", fields.get(2, bytes(4)))[0])
            types.append(kind)
        elif number == 3:  # normalizer_spec
            prefix = bool(fields.get(3, True))
    return {"model": "llama", "tokens": tokens, "scores": scores, "token_type": types, "add_space_prefix": prefix}


def _proto(data: bytes) -> Iterator[tuple[int, Any]]:
    """Yield (number, value) of the fields of a protobuf message: integers of varints, bytes of all else."""
    place = 0

    def varint() -> int:
        nonlocal place
        value, shift = 0, 0
        while True:
            byte = data[place]
            place, value, shift = place + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    while place < len(data):
        key = varint()
        kind = key & 7
        if kind == 0:
            yield key >> 3, varint()
            continue
        length = varint() if kind == 2 else {1: 8, 5: 4}[kind]
        yield key >> 3, data[place : place + length]
        place += length


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
