"""Tokenizers of .gguf files against llama.cpp's frozen ids, and files that are refused.

Frozen ids: see data/tokenizer/README.md.
"""

import importlib.util
import json
import os
import struct
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizer_texts import HARD, ROOT, TEXTS, frozen, like_gemma, text_ids, write_gguf

from e5core.gguf_file import read_gguf_metadata
from e5core.gguf_tokenizer import RefusalsNamed, load_gguf_tokenizer
from e5core.tokenizer import Tokenizer, TokenizerConfig


def test_smollm2_ids_equal_llama_cpp(smollm2: Tokenizer) -> None:
    assert text_ids(smollm2, TEXTS) == frozen("smollm2_ids")


@pytest.mark.parametrize("pre", ["default", "gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_each_pre_tokenizer_equals_llama_cpp(pre: str, smollm2_fields: dict[str, Any], tmp_path: Path) -> None:
    oracle = frozen("pre_tokenizer_ids")
    fields = {
        "tokens": smollm2_fields["tokens"] + oracle["tokens"],
        "token_type": smollm2_fields["token_type"] + [gguf.TokenType.NORMAL] * len(oracle["tokens"]),
        "merges": smollm2_fields["merges"] + oracle["merges"],
    }
    tokenizer = Tokenizer.load(write_gguf(tmp_path / "m.gguf", {**smollm2_fields, **fields, "pre": pre}))
    assert text_ids(tokenizer, HARD + oracle["texts"]) == oracle["ids"][pre]


def test_qwen2_normalises_to_nfc(smollm2_fields: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write_gguf(tmp_path / "m.gguf", {**smollm2_fields, "pre": "qwen2"}))
    assert unicodedata.normalize("NFC", "cafe\u0301") == "café"
    assert tokenizer.encode("cafe\u0301", 99) == tokenizer.encode("café", 99)


def test_sentencepiece_gguf_equals_its_model_file(
    mistral: Tokenizer, mistral_fields: dict[str, Any], tmp_path: Path
) -> None:
    rebuilt = Tokenizer.load(write_gguf(tmp_path / "m.gguf", mistral_fields))
    assert text_ids(rebuilt, TEXTS) == frozen("mistral_ids")
    assert rebuilt.contract() == mistral.contract()
    unprefixed = Tokenizer.load(write_gguf(tmp_path / "n.gguf", {**mistral_fields, "add_space_prefix": False}))
    assert text_ids(unprefixed, [" word"]) == text_ids(rebuilt, ["word"]) != text_ids(unprefixed, ["word"])


def test_tokens_that_users_defined_equal_llama_cpp(mistral_fields: dict[str, Any], tmp_path: Path) -> None:
    oracle = frozen("user_defined_ids")
    tokenizer = Tokenizer.load(write_gguf(tmp_path / "m.gguf", like_gemma(mistral_fields, oracle["tokens"])))
    assert text_ids(tokenizer, HARD + oracle["texts"]) == oracle["ids"]


def test_gemma_ids_equal_llama_cpp(gemma: Tokenizer) -> None:
    oracle = frozen("gemma3_ids")
    assert text_ids(gemma, TEXTS + oracle["texts"]) == oracle["ids"]


def test_gemma_has_bos_and_eos_of_its_metadata(gemma: Tokenizer) -> None:
    assert gemma.encode("Hello world", 99) == ([2, 9259, 1902, 1], False)
    assert gemma.encode("Hello world", 3) == ([2, 9259, 1], True)
    assert gemma.describe() == "tokenizer sentencepiece: bos 2 '<bos>', eos 1 '<eos>', vocabulary 262144"


def test_no_text_becomes_a_control_token_of_gemma(gemma: Tokenizer, gemma_gguf: Path) -> None:
    fields = read_gguf_metadata(gemma_gguf, "tokenizer.ggml.")
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    control = {i for i, kind in enumerate(types) if kind == gguf.TokenType.CONTROL}
    assert len(control) == 6249
    assert not control.intersection(*text_ids(gemma, ["".join(tokens[i] for i in sorted(control))]))


def test_gemma_gives_text_back(gemma: Tokenizer) -> None:
    # But for U+2581, sentencepiece's own sign for a space.
    texts = [text for text in TEXTS if "▁" not in text]
    for text, ids in zip(texts, gemma.encode_batch(texts, 10**9)[0], strict=True):
        assert gemma.decode(ids) == f"<bos>{text}<eos>"


def test_published_tokens_in_a_gguf_give_the_ids_of_their_tokenizer_json(published: Path, tmp_path: Path) -> None:
    content = json.loads((published / "tokenizer.json").read_text(encoding="utf-8"))
    added = {token["content"]: token for token in content["added_tokens"]}
    ids = content["model"]["vocab"] | {piece: token["id"] for piece, token in added.items()}
    kinds = {piece: 3 if token["special"] else 4 for piece, token in added.items()}
    merges = content["model"]["merges"]
    fields = {
        "model": "gpt2",
        "pre": {"tokenizer-qwen3": "qwen2", "tokenizer-llama3": "llama-bpe"}[published.parent.name],
        "tokens": sorted(ids, key=ids.__getitem__),
        "token_type": [kinds.get(piece, 1) for piece in sorted(ids, key=ids.__getitem__)],
        "merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in merges],
        "bos_token_id": ids.get("<|begin_of_text|>"),
        "eos_token_id": ids.get("<|im_end|>", ids.get("<|end_of_text|>")),
    }
    original = Tokenizer.load(published)
    rebuilt = Tokenizer.load(write_gguf(tmp_path / "m.gguf", fields))
    assert text_ids(rebuilt, TEXTS) == text_ids(original, TEXTS)
    assert rebuilt.contract() == original.contract()


def test_user_defined_tokens_are_matched_and_control_tokens_are_not(
    smollm2_fields: dict[str, Any], tmp_path: Path
) -> None:
    types = list(smollm2_fields["token_type"])
    types[4] = gguf.TokenType.USER_DEFINED  # <reponame>
    tokenizer = Tokenizer.load(write_gguf(tmp_path / "m.gguf", {**smollm2_fields, "token_type": types}))
    ids = text_ids(tokenizer, ["a<reponame>b<filename>"])[0]
    assert 4 in ids and 6 not in ids


def test_an_end_mark_is_a_control_token_whatever_its_type_says(smollm2_fields: dict[str, Any], tmp_path: Path) -> None:
    types = list(smollm2_fields["token_type"])
    types[0], types[2] = gguf.TokenType.USER_DEFINED, gguf.TokenType.USER_DEFINED  # <|endoftext|>, <|im_end|>
    tokenizer = Tokenizer.load(write_gguf(tmp_path / "m.gguf", {**smollm2_fields, "token_type": types}))
    assert not {0, 2}.intersection(*text_ids(tokenizer, ["a<|endoftext|>b<|im_end|>"]))


def test_unknown_token_is_the_one_that_the_metadata_names(mistral_fields: dict[str, Any], tmp_path: Path) -> None:
    fields = like_gemma(mistral_fields, [])
    for unknown_id, expected in ((31999, 31999), (None, 0)):
        path = write_gguf(tmp_path / "m.gguf", {**fields, "unknown_token_id": unknown_id})
        assert load_gguf_tokenizer(path).model.is_unknown(expected)
    fields["unknown_token_id"] = 32000
    with pytest.raises(ValueError, match=r"unknown_token_id must lie in 0..31999, got 32000"):
        Tokenizer.load(write_gguf(tmp_path / "m.gguf", fields))


@pytest.mark.parametrize("stored, expected", [(True, 1), (False, None), (None, None)])
def test_byte_level_bpe_gguf_has_a_bos_only_where_it_says_so(
    stored: bool | None, expected: int | None, smollm2_fields: dict[str, Any], tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "m.gguf", {**smollm2_fields, "add_bos_token": stored})
    assert Tokenizer.load(path).bos_id == expected


def test_llama_3_and_sentencepiece_ggufs_have_a_bos_unless_they_deny_it(
    smollm2_fields: dict[str, Any], mistral_fields: dict[str, Any], tmp_path: Path
) -> None:
    for fields in ({**smollm2_fields, "pre": "llama-bpe"}, mistral_fields):
        assert Tokenizer.load(write_gguf(tmp_path / "m.gguf", {**fields, "add_bos_token": None})).bos_id == 1
        assert Tokenizer.load(write_gguf(tmp_path / "m.gguf", {**fields, "add_bos_token": False})).bos_id is None


def test_missing_bos_and_eos_ids_name_the_setting_that_gives_them(
    smollm2_fields: dict[str, Any], tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "m.gguf", {**smollm2_fields, "eos_token_id": None})
    with pytest.raises(ValueError, match="set tokenizer.eos_id"):
        Tokenizer.load(path)
    assert Tokenizer.load(path, TokenizerConfig(eos_id=2)).eos_id == 2
    path = write_gguf(tmp_path / "n.gguf", {**smollm2_fields, "bos_token_id": None, "add_bos_token": True})
    with pytest.raises(ValueError, match="set tokenizer.bos_id"):
        Tokenizer.load(path)


def test_contract_sees_a_changed_piece_merge_and_score(
    smollm2: Tokenizer,
    mistral: Tokenizer,
    smollm2_fields: dict[str, Any],
    mistral_fields: dict[str, Any],
    tmp_path: Path,
) -> None:
    path, known = tmp_path / "m.gguf", [smollm2.contract()["sha256"], mistral.contract()["sha256"]]
    merges = [*smollm2_fields["merges"][1::-1], *smollm2_fields["merges"][2:]]
    known.append(Tokenizer.load(write_gguf(path, {**smollm2_fields, "merges": merges})).contract()["sha256"])
    tokens = ["<renamed>", *smollm2_fields["tokens"][1:]]
    known.append(Tokenizer.load(write_gguf(path, {**smollm2_fields, "tokens": tokens})).contract()["sha256"])
    scores = [*mistral_fields["scores"][:-1], -1.5]
    known.append(Tokenizer.load(write_gguf(path, {**mistral_fields, "scores": scores})).contract()["sha256"])
    assert len(set(known)) == 5


@pytest.mark.parametrize("error", [KeyError("a"), RuntimeError("b"), KeyboardInterrupt()])
def test_only_the_librarys_own_refusal_becomes_a_damaged_file(error: BaseException, tmp_path: Path) -> None:
    with pytest.raises(type(error)), RefusalsNamed(tmp_path):
        raise error


def test_a_gguf_cut_or_garbled_is_named(tmp_path: Path, smollm2_file: Path) -> None:
    cut = tmp_path / "cut.gguf"
    one_key = b"GGUF" + struct.pack("<IQQ", 3, 0, 1)
    endless_key = one_key + struct.pack("<Q", 2**64 - 1)
    endless_array = one_key + struct.pack("<Q1sIIQ", 1, b"a", 9, 12, 2**62)
    cut_short = smollm2_file.read_bytes()[:500_000]
    for content in (b"", b"GGML" + bytes(60), cut_short, b"GGUF" + b"\xff" * 60, endless_key, endless_array):
        cut.write_bytes(content)
        with pytest.raises(ValueError, match="cannot read the metadata of .*cut.gguf"):
            Tokenizer.load(cut)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"merges": ["a"]}, "merges is no pair"),
        ({"merges": ["none such"]}, "m.gguf: `tokenizers` refuses it"),
        ({"pre": "tekken"}, "pre is 'tekken', supported are default, gpt-2, smollm, llama-bpe, qwen2"),
        ({"pre": None}, "lacks tokenizer.ggml.pre"),
        ({"merges": None}, "lacks tokenizer.ggml.merges"),
        ({"model": "t5"}, "model is 't5', supported are gpt2, llama"),
        ({"token_type": [1, 1]}, "must be of one length"),
        ({"tokens": ["a"], "token_type": [7]}, "token_type must lie in 0..6, got 7"),
    ],
)
def test_unsupported_gguf_is_refused_by_name(
    change: dict[str, Any], message: str, smollm2_fields: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        Tokenizer.load(write_gguf(tmp_path / "m.gguf", {**smollm2_fields, **change}))


def derive(out: Path, *arguments: str | Path) -> dict[str, Any]:
    """Run tests/derive_tokenizer_ids.py. Returns {name of the file: its content}."""
    if importlib.util.find_spec("xllamacpp") is None:
        pytest.skip("the package xllamacpp is not installed")
    command = [sys.executable, ROOT / "tests" / "derive_tokenizer_ids.py", "--out", out, *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert run.returncode == 0, run.stderr[-2000:]
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in out.iterdir()}


@pytest.mark.slow
def test_frozen_ids_are_what_the_originals_give(tmp_path: Path, smollm2_file: Path, mistral_file: Path) -> None:
    names = ["smollm2_ids", "mistral_ids", "pre_tokenizer_ids", "user_defined_ids"]
    assert derive(tmp_path) == {name: frozen(name) for name in names}


@pytest.mark.slow
def test_frozen_gemma_ids_are_what_llama_cpp_gives(tmp_path: Path, gemma_gguf: Path) -> None:
    assert derive(tmp_path, "--gemma", gemma_gguf) == {"gemma3_ids": frozen("gemma3_ids")}
