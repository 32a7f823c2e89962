"""The tokenizer inside a .gguf file, rebuilt as an object of the library that the model was made with.

llama.cpp keeps tokens, merges or scores, token types and the name of the pre-tokenizer as metadata (tokenizer.ggml.*).
From these come a `tokenizers.Tokenizer` ("gpt2": byte-level BPE) or a `SentencePieceProcessor` ("llama": Llama 2,
Mistral, Gemma), which give llama.cpp's own ids with parse_special off. Where the file is silent about BOS and EOS,
llama.cpp's defaults hold, but for one: its EOS of 11 for every byte-level BPE is right for Falcon alone, so there a
file must name its EOS. Gemma's file says BOS 2 and EOS 1 (<eos>); <end_of_turn> (106) ends a chat turn, not a text.

Known to differ: sentencepiece counts U+2581 written in a text as a space also where runs of spaces are tokens of their
own (Gemma), so two in a row give the token of two spaces; llama.cpp gives that token for real spaces alone.
"""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers

from e5core.gguf_file import read_gguf_metadata


class RefusalsNamed:
    """Turn what `tokenizers` raises at a file that it refuses into a ValueError that names the file.

    The library raises Exception itself, no class of its own; this takes that very class and lets every subclass pass.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is Exception:
            raise ValueError(f"{self._path}: `tokenizers` refuses it ({error}); copy or download it again") from error


@dataclass(frozen=True, kw_only=True, slots=True)
class GgufTokenizer:
    """A rebuilt tokenizer and what the file says about its special ids."""

    model: tokenizers.Tokenizer | sentencepiece.SentencePieceProcessor
    bos_id: int | None
    eos_id: int | None
    add_bos: bool


def load_gguf_tokenizer(path: Path) -> GgufTokenizer:
    """Rebuild the tokenizer of a .gguf file.

    Raises ValueError where the file is cut, lacks a key or holds an unsupported kind.
    """
    prefix = "tokenizer.ggml."
    metadata = {key.removeprefix(prefix): value for key, value in read_gguf_metadata(path, prefix).items()}
    kind = metadata.get("model")
    needed = {"gpt2": ("pre", "tokens", "merges", "token_type"), "llama": ("tokens", "scores", "token_type")}
    if kind not in needed:
        raise ValueError(f"{path}: {prefix}model is {kind!r}, supported are {', '.join(needed)}")
    missing = [prefix + key for key in needed[kind] if key not in metadata]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}: convert the model again with a newer llama.cpp")
    lengths = {key: len(metadata[key]) for key in needed[kind] if key not in ("pre", "merges")}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{path}: the {prefix} arrays must be of one length, got {lengths}; convert the model again")
    build, bos_id, eos_id, add_bos = byte_pair, None, None, False
    if kind == "llama":
        build, bos_id, eos_id, add_bos = _sentencepiece, 1, 2, True
    elif metadata["pre"] not in PRE_TOKENIZERS:
        raise ValueError(f"{path}: {prefix}pre is {metadata['pre']!r}, supported are {', '.join(PRE_TOKENIZERS)}")
    else:
        add_bos = PRE_TOKENIZERS[metadata["pre"]].add_bos
    return GgufTokenizer(
        model=build(path, metadata),
        bos_id=metadata.get("bos_token_id", bos_id),
        eos_id=metadata.get("eos_token_id", eos_id),
        add_bos=metadata.get("add_bos_token", add_bos),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _PreTokenizer:
    """How a byte-level BPE cuts text into words before it merges: each pattern cuts what the one before left."""

    patterns: tuple[str, ...]
    nfc: bool = False  # normalise first
    whole_words: bool = False  # a word that is a token is taken whole, whatever the merges say
    add_bos: bool = False  # where the file does not say


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS = {
    "default": _PreTokenizer(patterns=(r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    "gpt-2": _PreTokenizer(patterns=(_GPT2,)),
    "smollm": _PreTokenizer(patterns=(r"\p{N}", _GPT2)),
    "llama-bpe": _PreTokenizer(patterns=(_LLAMA3,), whole_words=True, add_bos=True),
    # llama.cpp leaves the normalisation out; Qwen's own tokenizer.json has it.
    "qwen2": _PreTokenizer(patterns=(_LLAMA3.replace("{1,3}", ""),), nfc=True),
}
# tokenizer.ggml.token_type, the numbers that sentencepiece gives its pieces
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
_TYPES = range(7)
# llama.cpp takes these for control tokens whatever their type says, so Gemma's </s> (html to Gemma) is spelt out too.
_END_MARKS = frozenset(
    ("</s>", "<eos>", "<end_of_turn>", "<|endoftext|>", "<|im_end|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>")
)


def _token_types(path: Path, metadata: dict[str, Any]) -> list[int]:
    unheard = set(metadata["token_type"]).difference(_TYPES)
    if unheard:
        raise ValueError(f"{path}: tokenizer.ggml.token_type must lie in 0..{_TYPES[-1]}, got {min(unheard)}")
    return [
        _CONTROL if kind == _USER_DEFINED and token in _END_MARKS else kind
        for token, kind in zip(metadata["tokens"], metadata["token_type"], strict=True)
    ]


def byte_pair(path: Path, metadata: dict[str, Any]) -> tokenizers.Tokenizer:
    """Build the tokenizer that tokenizer.ggml.pre, tokens, merges and token_type (keys without the prefix) describe.

    path: of the file, for messages.  Raises ValueError for what makes no tokenizer.
    """
    pre_tokenizer = PRE_TOKENIZERS[metadata["pre"]]
    tokens, types = metadata["tokens"], _token_types(path, metadata)
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    if len(vocab) < len(tokens):
        raise ValueError(f"{path}: tokenizer.ggml.tokens holds a token twice; convert the model again")
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["merges"]]
    if any(len(merge) != 2 for merge in merges):
        raise ValueError(f"{path}: a line of tokenizer.ggml.merges is no pair; convert the model again")
    with RefusalsNamed(path):
        model = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges, ignore_merges=pre_tokenizer.whole_words))
    if pre_tokenizer.nfc:
        model.normalizer = tokenizers.normalizers.NFC()
    patterns = [tokenizers.Regex(pattern) for pattern in pre_tokenizer.patterns]
    cuts = [tokenizers.pre_tokenizers.Split(pattern, "isolated") for pattern in patterns]
    to_bytes = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([*cuts, to_bytes])
    model.decoder = tokenizers.decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, types, strict=True) if kind in (_CONTROL, _UNKNOWN)]
    matched = [token for token, kind in zip(tokens, types, strict=True) if kind == _USER_DEFINED]
    model.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in special])
    model.add_tokens([tokenizers.AddedToken(token, special=False, normalized=False) for token in matched])
    return model


def _sentencepiece(path: Path, metadata: dict[str, Any]) -> sentencepiece.SentencePieceProcessor:
    """Write the tokens as a ModelProto: protobuf's wire format, the field numbers of sentencepiece_model.proto."""
    proto, types = bytearray(), _token_types(path, metadata)
    if _UNKNOWN not in types:
        # Gemma's <unk> is typed as a control token; sentencepiece 0.2.0 refuses a model with no unknown one.
        unknown_id = metadata.get("unknown_token_id", 0)
        if not 0 <= unknown_id < len(types):
            raise ValueError(
                f"{path}: tokenizer.ggml.unknown_token_id must lie in 0..{len(types) - 1}, got {unknown_id}"
            )
        types[unknown_id] = _UNKNOWN
    for token, score, kind in zip(metadata["tokens"], metadata["scores"], types, strict=True):
        # llama.cpp's converter writes runs of spaces as such; sentencepiece looks for them after it escaped the text.
        piece = token.replace(" ", "▁") if kind == _USER_DEFINED else token
        # Fields 2 and 3 in one go: Gemma's 262,144 pieces load in 1.2 s on one CPU core, by single fields in 1.6 s.
        proto += _field(1, _field(1, piece.encode()) + struct.pack("<BfBB", 2 << 3 | 5, score, 3 << 3, kind))
    byte_pair_encoding, byte_fallback = 2, 1
    proto += _field(2, _field(3, byte_pair_encoding) + _field(35, byte_fallback))
    # 3: add_dummy_prefix, 4: remove_extra_whitespaces, 5: escape_whitespaces; no table of character replacements.
    space_prefix = int(metadata.get("add_space_prefix", True))
    proto += _field(3, _field(1, b"identity") + _field(3, space_prefix) + _field(4, 0) + _field(5, 1))
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=bytes(proto))
    except RuntimeError as error:
        raise ValueError(f"{path}: its tokens make no sentencepiece model: {error}; convert the model again") from error


def _field(number: int, value: bytes | int) -> bytes:
    if isinstance(value, bytes):
        return _varint(number << 3 | 2) + _varint(len(value)) + value
    return _varint(number << 3) + _varint(value)


def _varint(value: int) -> bytes:
    data = bytearray()
    while value > 127:
        data.append(value & 127 | 128)
        value >>= 7
    data.append(value)
    return bytes(data)
