"""Text to token ids and back, for every model that the backbone can read.

The original libraries do the splitting: sentencepiece for Mistral, Llama 2 and Gemma, `tokenizers` for the rest. A
Hugging Face folder carries a model as tokenizer.json or tokenizer.model, a .gguf file as metadata (see gguf_tokenizer).
BOS and EOS are put by this room alone, never by a post-processor: an encoded text is

    [bos] + ids[: max_tokens - 1 - len([bos])] + [eos]

so its last id is EOS whatever its length, and the embedding is read there. Which ids these are comes from the model
file, or from the [tokenizer] table. Strings that look like control tokens ("</s>", "<|im_end|>") are plain text.
The EOS is the one that the files name: Qwen3 chat <|im_end|>, Qwen3 base <|endoftext|>, Llama 3 <|end_of_text|>, its
chat models <|eot_id|>, Gemma 3 <eos>. Fine-tuning teaches whichever it is; weights that already embed need the one
that they learnt (Qwen3-Embedding: tokenizer.eos_id = 151643, <|endoftext|>, where its files name <|im_end|>).
"""

import hashlib
import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pydantic
import sentencepiece
import tokenizers

from e5core.config import read_json
from e5core.gguf_tokenizer import RefusalsNamed, load_gguf_tokenizer

TokenId = Annotated[int, pydantic.Field(ge=0)]


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerConfig:
    """The [tokenizer] table. None means "as the model file says"; Tokenizer.load is the one place that resolves it."""

    bos_id: TokenId | None = None  # id in front of every text, where add_bos holds
    eos_id: TokenId | None = None  # id after every text
    add_bos: bool | None = None  # put bos_id in front?


class Tokenizer:
    """One model's tokenizer with its BOS and EOS.

    bos_id: the id put in front of every text, None where none is put.  eos_id: the id put after every text.
    """

    def __init__(self, model: "_BytePairModel | _SentencePieceModel", bos_id: int | None, eos_id: int) -> None:
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.vocab_size = model.vocab_size
        self._model = model

    @classmethod
    def load(cls, path: Path, config: TokenizerConfig = TokenizerConfig()) -> "Tokenizer":
        """Load the tokenizer of a Hugging Face folder, a sentencepiece model file or a .gguf file.

        Raises ValueError where files or metadata are missing, the kind is not supported, or there is no EOS.
        """
        found = _find(Path(path))
        bos_id = found.bos_id if config.bos_id is None else config.bos_id
        eos_id = found.eos_id if config.eos_id is None else config.eos_id
        add_bos = found.add_bos if config.add_bos is None else config.add_bos
        if eos_id is None:
            raise ValueError(f"{path} names no EOS token: set tokenizer.eos_id to the id that should end every text")
        if add_bos and bos_id is None:
            raise ValueError(f"{path} has a BOS but no id for it: set tokenizer.bos_id, or tokenizer.add_bos = false")
        if not add_bos:
            bos_id = None
        last = found.model.vocab_size - 1
        for name, value in (("eos_id", eos_id), ("bos_id", bos_id)):
            if value is not None and not 0 <= value <= last:
                raise ValueError(f"tokenizer.{name} must lie in 0..{last} for {path}, got {value}")
        return cls(found.model, bos_id, eos_id)

    def encode(self, text: str, max_tokens: int) -> tuple[list[int], bool]:
        """Encode one text to at most max_tokens ids, BOS and EOS included. Returns (ids, was the text truncated)."""
        ids, n_truncated = self.encode_batch([text], max_tokens)
        return ids[0], n_truncated == 1

    def encode_batch(self, texts: Sequence[str], max_tokens: int) -> tuple[list[list[int]], int]:
        """Encode texts to at most max_tokens ids each, BOS and EOS included.

        Returns (ids, number of truncated texts).  Raises ValueError where max_tokens leaves no room for text, and where
        a text is not valid Unicode.
        """
        front = [] if self.bos_id is None else [self.bos_id]
        budget = max_tokens - 1 - len(front)
        if budget < 1:
            raise ValueError(
                f"max_tokens must be at least {2 + len(front)} (special ids and one of text), got {max_tokens}"
            )
        try:
            encoded = self._model.encode_batch(texts)
        except TypeError as error:
            # Both libraries raise it at half of a surrogate pair, which the escape of a broken JSON file can bring in.
            bad = [i for i, text in enumerate(texts) if not isinstance(text, str) or not _is_unicode(text)]
            if not bad:
                raise
            raise ValueError(f"text {bad[0]} of the batch is not valid Unicode, got {texts[bad[0]]!r:.80}") from error
        n_truncated = sum(len(ids) > budget for ids in encoded)
        return [[*front, *ids[:budget], self.eos_id] for ids in encoded], n_truncated

    def decode(self, ids: Sequence[int]) -> str:
        """Turn ids into text for people to read, special tokens written out."""
        return self._model.decode(ids)

    @property
    def library(self) -> tokenizers.Tokenizer | sentencepiece.SentencePieceProcessor:
        """The library's own object, which splits text; it knows nothing of our BOS and EOS."""
        return self._model.library

    def piece(self, token_id: int) -> str:
        """Return the string of an id."""
        return self._model.pieces()[token_id]

    def contract(self) -> dict[str, str | int | None]:
        """Return what a run stores, so that a later load can tell whether ids still mean the same."""
        return {
            "kind": self._model.kind,
            "bos_id": self.bos_id,
            "eos_id": self.eos_id,
            "vocab_size": self.vocab_size,
            "sha256": self._model.sha256(),
        }

    def check_contract(self, stored: Mapping[str, str | int | None]) -> None:
        """Raise ValueError naming each field in which this tokenizer differs from the stored contract."""
        differences = [
            f"{field} is {value!r} here, {stored.get(field, 'absent')!r} there"
            for field, value in self.contract().items()
            if field not in stored or stored[field] != value
        ]
        if differences:
            raise ValueError(
                f"tokenizer differs from the stored one: {'; '.join(differences)}; load the model that was stored, "
                "or set the [tokenizer] table as it was"
            )

    def describe(self) -> str:
        """Return one log line: kind, BOS, EOS, vocabulary size."""
        bos = "none" if self.bos_id is None else f"{self.bos_id} {self._model.pieces()[self.bos_id]!r}"
        eos = f"{self.eos_id} {self._model.pieces()[self.eos_id]!r}"
        return f"tokenizer {self._model.kind}: bos {bos}, eos {eos}, vocabulary {self.vocab_size}"


class _BytePairModel:
    kind = "bpe"

    def __init__(self, model: tokenizers.Tokenizer) -> None:
        # Without this "<|im_end|>" in a text becomes the control token. A tokenizer.json does not keep the setting.
        model.encode_special_tokens = True
        model.no_truncation()
        model.no_padding()
        self._model = self.library = model
        self.vocab_size = max(model.get_vocab(with_added_tokens=True).values()) + 1

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._model.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode(list(ids), skip_special_tokens=False)

    def token_id(self, piece: str) -> int | None:
        return self._model.token_to_id(piece)

    def puts_in_front(self, token_id: int) -> bool:
        """Does the file's own post-processor begin a text with this id?"""
        return self._model.encode("a", add_special_tokens=True).ids[:1] == [token_id]

    def pieces(self) -> list[str]:
        pieces = [""] * self.vocab_size
        for piece, token_id in self._model.get_vocab(with_added_tokens=True).items():
            pieces[token_id] = piece
        return pieces

    def sha256(self) -> str:
        merges = json.loads(self._model.to_str())["model"]["merges"]
        return _sha256([*self.pieces(), *(" ".join(merge) for merge in merges)])


class _SentencePieceModel:
    kind = "sentencepiece"

    def __init__(self, model: sentencepiece.SentencePieceProcessor) -> None:
        self._model = self.library = model
        self.vocab_size = model.vocab_size()

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._model.encode(list(texts), out_type=int)

    def decode(self, ids: Sequence[int]) -> str:
        # sentencepiece drops control pieces, so the runs between them are decoded one by one.
        text, run = [], []
        for token_id in ids:
            if self._model.is_control(token_id):
                text += [self._model.decode(run), self._model.id_to_piece(token_id)]
                run = []
            else:
                run.append(token_id)
        return "".join([*text, self._model.decode(run)])

    def token_id(self, piece: str) -> int | None:
        token_id = self._model.piece_to_id(piece)  # the unknown token's id where there is no such piece
        return token_id if self._model.id_to_piece(token_id) == piece else None

    def pieces(self) -> list[str]:
        return self._model.id_to_piece(list(range(self.vocab_size)))

    def sha256(self) -> str:
        # Scores are this kind's merges: the best score merges first.
        scores = self._model.get_score(list(range(self.vocab_size)))
        return _sha256([*self.pieces(), *(struct.pack("<f", score).hex() for score in scores)])


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _sha256(parts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode()
        digest.update(len(data).to_bytes(4, "little") + data)
    return digest.hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Found:
    """What the model's files say, before [tokenizer] has its word."""

    model: _BytePairModel | _SentencePieceModel
    bos_id: int | None
    eos_id: int | None
    add_bos: bool


def _find(path: Path) -> _Found:
    if path.is_dir():
        return _find_in_folder(path)
    if not path.is_file():
        raise ValueError(f"no tokenizer at {path}: no such file or folder; give a folder, a .model or a .gguf file")
    if path.suffix == ".gguf":
        return _from_gguf(path)
    if ".model" in path.suffixes:
        return _from_sentencepiece_file(path)
    raise ValueError(f"cannot read a tokenizer from {path}: allowed are a folder, a .model or a .gguf file")


def _find_in_folder(folder: Path) -> _Found:
    if (folder / "tokenizer.json").is_file():
        return _from_tokenizer_json(folder)
    if (folder / "tokenizer.model").is_file():
        return _from_sentencepiece_file(folder / "tokenizer.model")
    versioned = sorted(path for path in folder.iterdir() if ".model" in path.suffixes)
    if len(versioned) == 1:
        return _from_sentencepiece_file(versioned[0])
    if versioned:
        names = ", ".join(path.name for path in versioned)
        raise ValueError(f"{folder} holds several tokenizers ({names}): give the path of one of them")
    raise ValueError(
        f"no tokenizer in {folder}: looked for tokenizer.json, tokenizer.model and *.model.v*; "
        "download the model's tokenizer files into it"
    )


def _from_tokenizer_json(folder: Path) -> _Found:
    path = folder / "tokenizer.json"
    content = _read_object(path).get("model")
    if not isinstance(content, dict):
        raise ValueError(f"{path}: model must be an object, got {content!r:.80}; copy or download it again")
    if content.get("type") != "BPE":
        raise ValueError(f"{path} holds a tokenizer of type {content.get('type')!r}, allowed is 'BPE'")
    for key, kind, article in (("vocab", dict, "an object"), ("merges", list, "a list")):
        if not isinstance(content.get(key), kind):
            raise ValueError(f"{path}: model.{key} must be {article}, got {content.get(key)!r:.80}")
    if not content["vocab"]:
        raise ValueError(f"{path}: model.vocab must not be empty; copy or download it again")
    with RefusalsNamed(path):
        model = _BytePairModel(tokenizers.Tokenizer.from_file(str(path)))
    converted = bool(content.get("byte_fallback"))  # from sentencepiece
    if converted and (folder / "tokenizer.model").is_file():
        # The original decides where it has every piece: Mistral's as transformers 5 converts it gave other ids.
        original = _from_sentencepiece_file(folder / "tokenizer.model")
        if original.model.vocab_size == model.vocab_size:
            return original
    bos_id, eos_id, add_bos = _special_ids(folder, model)
    if add_bos is None and bos_id is not None:
        # Llama 3 always has a BOS, but copies of its first tokenizer.json lack the post-processor that puts it.
        add_bos = converted or bos_id == model.token_id("<|begin_of_text|>") or model.puts_in_front(bos_id)
    return _Found(model=model, bos_id=bos_id, eos_id=eos_id, add_bos=bool(add_bos))


def _from_sentencepiece_file(path: Path) -> _Found:
    try:
        processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise ValueError(f"{path} is not a whole sentencepiece model: {error}; copy it again") from error
    model = _SentencePieceModel(processor)
    bos_id, eos_id, add_bos = _special_ids(path.parent, model)
    if bos_id is None and processor.bos_id() >= 0:
        bos_id = processor.bos_id()
    if eos_id is None and processor.eos_id() >= 0:
        eos_id = processor.eos_id()
    return _Found(model=model, bos_id=bos_id, eos_id=eos_id, add_bos=bos_id is not None if add_bos is None else add_bos)


def _from_gguf(path: Path) -> _Found:
    found = load_gguf_tokenizer(path)
    wrapped = _BytePairModel if isinstance(found.model, tokenizers.Tokenizer) else _SentencePieceModel
    return _Found(model=wrapped(found.model), bos_id=found.bos_id, eos_id=found.eos_id, add_bos=found.add_bos)


def _special_ids(
    folder: Path, model: _BytePairModel | _SentencePieceModel
) -> tuple[int | None, int | None, bool | None]:
    """Return (bos_id, eos_id, add_bos) as the folder's config files say, the tokenizer's before the model's."""
    names = ("tokenizer_config.json", "config.json", "generation_config.json")
    configs = {folder / n: _read_object(folder / n) for n in names if (folder / n).is_file()}
    tokenizer_config = configs.pop(folder / names[0], {})
    ids: list[int | None] = []
    for name in ("bos", "eos"):
        token = tokenizer_config.get(f"{name}_token")
        piece = token.get("content", token) if isinstance(token, dict) else token
        if piece is None:
            ids.append(_listed_id(configs, f"{name}_token_id"))
            continue
        token_id = model.token_id(piece) if isinstance(piece, str) else None
        if token_id is None:
            raise ValueError(f"{folder / names[0]}: {name}_token {piece!r} is no piece of the tokenizer")
        ids.append(token_id)
    add_bos = tokenizer_config.get("add_bos_token")
    if add_bos is not None and not isinstance(add_bos, bool):
        raise ValueError(f"{folder / names[0]}: add_bos_token must be true or false, got {add_bos!r}")
    return ids[0], ids[1], add_bos


def _listed_id(configs: Mapping[Path, Mapping[str, Any]], key: str) -> int | None:
    """Return the id that the first of the files names, of a list its first, or None where none does."""
    for path, config in configs.items():
        listed = config.get(key)
        token_id = listed[0] if isinstance(listed, list) and listed else listed
        if token_id is None:
            continue
        if isinstance(token_id, bool) or not isinstance(token_id, int):
            raise ValueError(f"{path}: {key} must be a whole number or a list of them, got {listed!r}")
        return token_id
    return None


def _read_object(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content
