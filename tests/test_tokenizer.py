"""Tokenizers of folders and model files against the originals' ids, and BOS, EOS and limits around them.

Frozen ids: see data/tokenizer/README.md.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from tokenizer_texts import NO_LIMIT, RECORDS, TEXTS, frozen, text_ids, write_json

from e5core.tokenizer import Tokenizer, TokenizerConfig

SPECIAL = ["<|im_end|>", "<|im_start|>user", "</s>", "<s>", "<unk>", "a</s>b", "<|endoftext|>", "<0x0A>"]


def test_the_texts_are_1000_in_over_30_languages() -> None:
    assert len(TEXTS) == len(set(TEXTS)) == 1000
    assert len({record["language"] for record in RECORDS}) >= 30


def test_mistral_ids_equal_sentencepiece(mistral: Tokenizer, mistral_file: Path) -> None:
    original = sentencepiece.SentencePieceProcessor(model_file=str(mistral_file))
    assert text_ids(mistral, TEXTS) == frozen("mistral_ids") == original.encode(TEXTS, out_type=int)


def test_saved_tokenizer_json_gives_equal_ids(
    smollm2: Tokenizer, smollm2_fields: dict[str, Any], tmp_path: Path
) -> None:
    write_bpe_folder(tmp_path, smollm2_fields)
    write_json(tmp_path / "config.json", {"eos_token_id": [2, 0], "bos_token_id": 1})
    saved = Tokenizer.load(tmp_path)
    assert text_ids(saved, TEXTS + SPECIAL) == text_ids(smollm2, TEXTS + SPECIAL)
    assert saved.contract() == smollm2.contract()


def write_bpe_folder(folder: Path, fields: dict[str, Any], bos_piece: str | None = None) -> None:
    """Write tokenizer.json as SmolLM2's own looks, with the library alone; bos_piece: what its post-processor puts."""
    merges = [tuple(merge.split(" ")) for merge in fields["merges"]]
    model = tokenizers.Tokenizer(tokenizers.models.BPE({t: i for i, t in enumerate(fields["tokens"])}, merges))
    digits = tokenizers.pre_tokenizers.Digits(individual_digits=True)
    words = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    model.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([digits, words])
    model.decoder = tokenizers.decoders.ByteLevel()
    model.add_special_tokens([t for t, kind in zip(fields["tokens"], fields["token_type"], strict=True) if kind == 3])
    model.enable_truncation(8)
    if bos_piece is not None:
        special = [(bos_piece, model.token_to_id(bos_piece))]
        model.post_processor = tokenizers.processors.TemplateProcessing(f"{bos_piece} $A", special_tokens=special)
    model.save(str(folder / "tokenizer.json"))


def test_folder_takes_special_ids_from_its_config_files(smollm2_fields: dict[str, Any], tmp_path: Path) -> None:
    write_bpe_folder(tmp_path, smollm2_fields)
    with pytest.raises(ValueError, match="set tokenizer.eos_id"):
        Tokenizer.load(tmp_path)
    write_json(tmp_path / "generation_config.json", {"eos_token_id": 7})
    assert Tokenizer.load(tmp_path).eos_id == 7
    write_json(tmp_path / "config.json", {"eos_token_id": [5, 6], "bos_token_id": 4})
    assert (Tokenizer.load(tmp_path).eos_id, Tokenizer.load(tmp_path).bos_id) == (5, None)
    config = {"eos_token": {"content": "<|im_end|>"}, "bos_token": "<|im_start|>", "add_bos_token": True}
    write_json(tmp_path / "tokenizer_config.json", config)
    assert (Tokenizer.load(tmp_path).eos_id, Tokenizer.load(tmp_path).bos_id) == (2, 1)
    write_json(tmp_path / "tokenizer_config.json", {"eos_token": "<absent>"})
    with pytest.raises(ValueError, match="eos_token '<absent>' is no piece"):
        Tokenizer.load(tmp_path)


def test_folder_has_a_bos_where_its_post_processor_puts_one(
    smollm2: Tokenizer, smollm2_fields: dict[str, Any], tmp_path: Path
) -> None:
    write_bpe_folder(tmp_path, smollm2_fields, bos_piece="<|im_start|>")
    write_json(tmp_path / "config.json", {"eos_token_id": 2, "bos_token_id": 1})
    assert Tokenizer.load(tmp_path).encode("x", 9)[0] == [1, *text_ids(smollm2, ["x"])[0], 2]
    write_json(tmp_path / "tokenizer_config.json", {"add_bos_token": False})
    assert Tokenizer.load(tmp_path).bos_id is None


def test_llama_3_folder_has_a_bos_though_its_post_processor_puts_none(tmp_path: Path) -> None:
    model = {"type": "BPE", "vocab": {"a": 0, "</s>": 1, "<|begin_of_text|>": 2}, "merges": []}
    write_json(tmp_path / "tokenizer.json", {"version": "1.0", "model": model})
    for bos_id, expected in ((2, [2, 0, 1]), (1, [0, 1])):
        write_json(tmp_path / "config.json", {"bos_token_id": bos_id, "eos_token_id": 1})
        assert Tokenizer.load(tmp_path).encode("a", 9)[0] == expected
    write_json(tmp_path / "tokenizer_config.json", {"bos_token": "<|begin_of_text|>", "add_bos_token": False})
    assert Tokenizer.load(tmp_path).bos_id is None


def test_published_tokenizer_json_equals_the_library(published: Path) -> None:
    library = tokenizers.Tokenizer.from_file(str(published / "tokenizer.json"))
    plain = [
        text
        for text in TEXTS
        if not any(token.content in text for token in library.get_added_tokens_decoder().values())
    ]
    assert len(plain) > 950
    tokenizer = Tokenizer.load(published)
    assert text_ids(tokenizer, plain) == [row.ids for row in library.encode_batch(plain, add_special_tokens=False)]
    library.encode_special_tokens = True
    expected = [row.ids for row in library.encode_batch(TEXTS + SPECIAL, add_special_tokens=False)]
    assert text_ids(tokenizer, TEXTS + SPECIAL) == expected
    bos, eos = {"tokenizer-qwen3": ([], 151645), "tokenizer-llama3": ([128000], 128001)}[published.parent.name]
    rows, _ = tokenizer.encode_batch(TEXTS + SPECIAL, NO_LIMIT)
    assert rows == [[*bos, *ids, eos] for ids in expected]


def write_converted_folder(folder: Path, fields: dict[str, Any], space_prefix: bool) -> None:
    """Write a sentencepiece model as tokenizer.json: a merge for every split of a piece, the best scores first."""
    vocab = {token: i for i, token in enumerate(fields["tokens"])}
    splits = [(token[:i], token[i:]) for token in vocab for i in range(1, len(token))]
    merges = [pair for pair in splits if pair[0] in vocab and pair[1] in vocab]
    merges.sort(key=lambda pair: -fields["scores"][vocab[pair[0] + pair[1]]])
    bpe = tokenizers.models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    model = tokenizers.Tokenizer(bpe)
    prepend = [tokenizers.normalizers.Prepend("▁")] if space_prefix else []
    model.normalizer = tokenizers.normalizers.Sequence([*prepend, tokenizers.normalizers.Replace(" ", "▁")])
    model.add_special_tokens(["<unk>", "<s>", "</s>"])
    model.save(str(folder / "tokenizer.json"))
    write_json(folder / "config.json", {"bos_token_id": 1, "eos_token_id": 2})


def test_converted_sentencepiece_folder_equals_sentencepiece(mistral_fields: dict[str, Any], tmp_path: Path) -> None:
    write_converted_folder(tmp_path, mistral_fields, space_prefix=True)
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.contract()["kind"], tokenizer.bos_id, tokenizer.eos_id) == ("bpe", 1, 2)
    assert text_ids(tokenizer, TEXTS) == frozen("mistral_ids")


def test_folder_with_the_original_model_beside_a_conversion_uses_the_original(
    mistral_file: Path, mistral_fields: dict[str, Any], tmp_path: Path
) -> None:
    write_converted_folder(tmp_path, mistral_fields, space_prefix=False)
    assert text_ids(Tokenizer.load(tmp_path), ["word"]) != text_ids(Tokenizer.load(mistral_file), ["word"])
    shutil.copy(mistral_file, tmp_path / "tokenizer.model")
    tokenizer = Tokenizer.load(tmp_path)
    assert text_ids(tokenizer, TEXTS) == frozen("mistral_ids")
    assert tokenizer.contract() == Tokenizer.load(mistral_file).contract()


@pytest.mark.parametrize("name", ["smollm2", "mistral"])
@pytest.mark.parametrize(
    "text, n_ids", [("", 0), ("a", 1), ("word " * 7, None), ("word " * 8, None), ("é日 " * 99, None)]
)
def test_every_text_ends_with_eos_within_the_limit(
    name: str, text: str, n_ids: int | None, request: pytest.FixtureRequest
) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(name)
    whole = text_ids(tokenizer, [text])[0]
    assert n_ids is None or len(whole) == n_ids
    front = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    full = max(len(whole), 1) + len(front) + 1  # the limit that this text fills exactly
    for max_tokens in range(2 + len(front), full + 2):
        ids, truncated = tokenizer.encode(text, max_tokens)
        kept = whole[: max_tokens - 1 - len(front)]
        assert ids == [*front, *kept, tokenizer.eos_id]
        assert len(ids) <= max_tokens
        assert truncated == (max_tokens < full)


def test_bos_counts_in_the_limit(mistral: Tokenizer) -> None:
    ids, truncated = mistral.encode("one two three four", 4)
    assert (len(ids), ids[0], ids[-1], truncated) == (4, 1, 2, True)


def test_limit_without_room_for_text_is_refused(smollm2: Tokenizer, mistral: Tokenizer) -> None:
    with pytest.raises(ValueError, match="max_tokens must be at least 2 .*got 1"):
        smollm2.encode("a", 1)
    with pytest.raises(ValueError, match="max_tokens must be at least 3 .*got 2"):
        mistral.encode("a", 2)


def test_truncated_texts_are_counted(smollm2: Tokenizer) -> None:
    ids, n_truncated = smollm2.encode_batch(["a b c d e", "a", "", "f g h i"], 4)
    assert n_truncated == 2
    assert [row[-1] for row in ids] == [2] * 4
    assert smollm2.encode_batch([], 4) == ([], 0)


@pytest.mark.parametrize("name", ["smollm2", "mistral"])
@pytest.mark.parametrize("text", SPECIAL)
def test_special_strings_are_plain_text(name: str, text: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(name)
    ids = text_ids(tokenizer, [text])[0]
    # Ids below these are control, unknown and (Mistral) byte tokens.
    assert len(ids) > 1
    assert min(ids) >= {"smollm2": 17, "mistral": 259}[name]


def test_config_overrides_the_model_file(smollm2_file: Path, mistral_file: Path) -> None:
    changed = Tokenizer.load(smollm2_file, TokenizerConfig(eos_id=0, bos_id=3, add_bos=True))
    assert changed.encode("x", 9)[0] == [3, *text_ids(changed, ["x"])[0], 0]
    assert Tokenizer.load(mistral_file, TokenizerConfig(add_bos=False)).bos_id is None
    with pytest.raises(ValueError, match=r"tokenizer.eos_id must lie in 0..49151 .*got 49152"):
        Tokenizer.load(smollm2_file, TokenizerConfig(eos_id=49152))


def test_contract_mismatch_names_each_field(smollm2: Tokenizer, mistral: Tokenizer, smollm2_file: Path) -> None:
    stored = json.loads(json.dumps(smollm2.contract()))
    smollm2.check_contract(stored)
    changed = Tokenizer.load(smollm2_file, TokenizerConfig(eos_id=0))
    with pytest.raises(ValueError, match="eos_id is 0 here, 2 there") as error:
        changed.check_contract(stored)
    assert "sha256" not in str(error.value)
    with pytest.raises(ValueError, match="kind is .*bos_id is .*vocab_size is .*sha256 is "):
        mistral.check_contract(stored)
    with pytest.raises(ValueError, match="bos_id is None here, 'absent' there"):
        smollm2.check_contract({key: value for key, value in stored.items() if key != "bos_id"})


def test_decode_keeps_text_and_shows_special_tokens(smollm2: Tokenizer, mistral: Tokenizer) -> None:
    for text, ids in zip(TEXTS, smollm2.encode_batch(TEXTS, NO_LIMIT)[0], strict=True):
        assert smollm2.decode(ids) == text + "<|im_end|>"
    assert mistral.decode(mistral.encode("Hello, wörld 日本", 99)[0]) == "<s>Hello, wörld 日本</s>"


def test_describe_names_ids_pieces_and_size(smollm2: Tokenizer, mistral: Tokenizer) -> None:
    assert smollm2.describe() == "tokenizer bpe: bos none, eos 2 '<|im_end|>', vocabulary 49152"
    assert mistral.describe() == "tokenizer sentencepiece: bos 1 '<s>', eos 2 '</s>', vocabulary 32000"


@pytest.mark.parametrize("name", ["smollm2", "mistral"])
@pytest.mark.parametrize("text", ["one two, 日本 12 " * 60_000, "a" * 1_000_000], ids=["words", "one word"])
def test_a_text_of_one_megabyte_is_cut_to_the_limit(name: str, text: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(name)
    ids, truncated = tokenizer.encode(text, 512)
    assert len(text.encode()) >= 1_000_000
    assert (len(ids), ids[-1], truncated) == (512, tokenizer.eos_id, True)


@pytest.mark.parametrize("name", ["smollm2", "mistral"])
def test_half_a_surrogate_pair_is_refused_by_its_place(name: str, request: pytest.FixtureRequest) -> None:
    with pytest.raises(ValueError, match="text 1 of the batch is not valid Unicode"):
        request.getfixturevalue(name).encode_batch(["fine", "x\ud83d"], 99)


def test_missing_files_are_named(tmp_path: Path, mistral_file: Path) -> None:
    with pytest.raises(ValueError, match=f"no tokenizer in {tmp_path}: looked for tokenizer.json, tokenizer.model"):
        Tokenizer.load(tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path}/absent: no such file or folder"):
        Tokenizer.load(tmp_path / "absent")
    shutil.copy(mistral_file, tmp_path / "tokenizer.model.v1")
    assert Tokenizer.load(tmp_path).vocab_size == 32000
    shutil.copy(mistral_file, tmp_path / "tokenizer.model.v2")
    with pytest.raises(ValueError, match="several tokenizers .tokenizer.model.v1, tokenizer.model.v2."):
        Tokenizer.load(tmp_path)


def test_broken_files_are_named(tmp_path: Path, mistral_file: Path) -> None:
    model = tmp_path / "tokenizer.model"
    model.write_bytes(mistral_file.read_bytes()[:100_000])
    with pytest.raises(ValueError, match="tokenizer.model is not a whole sentencepiece model"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "BPE"', encoding="utf-8")
    with pytest.raises(ValueError, match="tokenizer.json:1: not JSON"):
        Tokenizer.load(tmp_path)
    write_json(tmp_path / "tokenizer.json", {"model": {"type": "Unigram"}})
    with pytest.raises(ValueError, match="'Unigram', allowed is 'BPE'"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model": ["BPE"]}, r"model must be an object, got \['BPE'\]"),
        ({"model": {"type": "BPE", "merges": []}}, "model.vocab must be an object, got None"),
        ({"model": {"type": "BPE", "vocab": ["a"], "merges": []}}, "model.vocab must be an object, got"),
        ({"model": {"type": "BPE", "vocab": {}, "merges": []}}, "model.vocab must not be empty"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}}}, "model.merges must be a list, got None"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}}, "refuses it .Token `b` out of vocab"),
        ({"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}, "refuses it .invalid value"),
        ({"normalizer": {"type": "None such"}}, "refuses it"),
        ({"added_tokens": 3}, "refuses it"),
        ({"version": "9"}, "refuses it"),
    ],
)
def test_a_tokenizer_json_that_the_library_refuses_is_named(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    whole = {"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0, "</s>": 1}, "merges": []}}
    write_json(tmp_path / "config.json", {"eos_token_id": 1})
    write_json(tmp_path / "tokenizer.json", whole)
    assert Tokenizer.load(tmp_path).eos_id == 1
    write_json(tmp_path / "tokenizer.json", whole | change)
    with pytest.raises(ValueError, match=f"tokenizer.json.*{message}"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("config.json", {"eos_token_id": "1"}, "eos_token_id must be a whole number or a list of them, got '1'"),
        ("config.json", {"eos_token_id": []}, r"eos_token_id must be a whole number or a list of them, got \[\]"),
        ("config.json", {"eos_token_id": 1, "bos_token_id": True}, "bos_token_id must be a whole number"),
        ("config.json", [], "must hold a JSON object, got list"),
        ("tokenizer_config.json", {"eos_token": 1}, "eos_token 1 is no piece"),
        ("tokenizer_config.json", {"eos_token": {}}, "eos_token {} is no piece"),
        ("tokenizer_config.json", {"eos_token": "</s>", "add_bos_token": "no"}, "must be true or false, got 'no'"),
    ],
)
def test_special_ids_of_a_wrong_kind_are_named(file: str, content: Any, message: str, tmp_path: Path) -> None:
    model = {"type": "BPE", "vocab": {"a": 0, "</s>": 1}, "merges": []}
    write_json(tmp_path / "tokenizer.json", {"version": "1.0", "model": model})
    write_json(tmp_path / file, content)
    with pytest.raises(ValueError, match=f"/{file}.*{message}"):
        Tokenizer.load(tmp_path)
