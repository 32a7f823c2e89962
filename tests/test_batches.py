"""From records to packed micro-batches: the template, the relations, and every text exactly once."""

import pytest
import torch
from models import save_embedder

from e5core.batches import BatchConfig, build_batch, chosen_positive, pack, text_hash
from e5core.records import Record
from e5core.template import document_text, query_text
from e5core.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(save_embedder(tmp_path_factory.mktemp("model")))


def record(n: int, **changes: object) -> Record:
    values = {"id": f"r{n}", "task": "Find it.", "query": f"q{n}", "positives": (f"p{n}",), "negatives": (f"n{n}",)}
    return Record(**{**values, "source": "test", **changes})


def test_the_template_is_the_paper_s() -> None:
    assert query_text("Find it.", "what") == "Instruct: Find it.\nQuery: what"
    assert query_text("", "what") == "what"
    assert document_text("cafe\u0301") == "caf\u00e9"  # NFC
    assert text_hash("cafe\u0301") == text_hash("caf\u00e9") != text_hash("cafe")


def test_rows_are_queries_then_each_query_s_candidates(tokenizer: Tokenizer) -> None:
    records = [record(0), record(1, negatives=()), record(2, negatives=("n2", "m2"), in_batch=False)]
    batch = build_batch(records, tokenizer, BatchConfig(negatives=2), seed=0, step=0)
    texts = [tokenizer.decode(ids).removeprefix("<s>").removesuffix("</s>") for ids in batch.sequences]
    assert texts[:3] == [f"Instruct: Find it.\nQuery: q{i}" for i in range(3)]
    assert texts[3:] == ["p0", "n0", "p1", "p2", "n2", "m2"]
    r = batch.relations
    assert r.target.tolist() == [0, 2, 3] and r.owner.tolist() == [0, 0, 1, 2, 2, 2]
    assert r.query_open.tolist() == [True, True, False]
    assert r.candidate_open.tolist() == [True, True, True, False, False, False]
    assert r.candidate_hashes.tolist() == [text_hash(text) for text in texts[3:]]
    assert batch.n_queries == 3 and batch.record_ids == ["r0", "r1", "r2"]


def test_hard_negatives_are_cut_to_the_config(tokenizer: Tokenizer) -> None:
    batch = build_batch([record(0, negatives=("a", "b", "c"))], tokenizer, BatchConfig(negatives=1), seed=0, step=0)
    assert len(batch.sequences) == 3
    batch = build_batch([record(0)], tokenizer, BatchConfig(negatives=0), seed=0, step=0)
    assert len(batch.sequences) == 2


def test_documents_carry_the_instruction_only_for_the_named_kinds(tokenizer: Tokenizer) -> None:
    records = [record(0, kind="sts", symmetric=True), record(1)]
    batch = build_batch(records, tokenizer, BatchConfig(instruct_documents=("sts",)), seed=0, step=0)
    texts = [tokenizer.decode(ids) for ids in batch.sequences]
    assert [("Instruct" in text) for text in texts] == [True, True, True, True, False, False]
    assert batch.relations.candidate_hashes[0] == text_hash("p0")  # hashes are of the raw text


def test_own_query_and_other_positives_are_banned(tokenizer: Tokenizer) -> None:
    records = [record(0, positives=("p0", "x", "y")), record(1)]
    batch = build_batch(records, tokenizer, BatchConfig(), seed=0, step=0)
    banned = batch.relations.banned.tolist()
    assert set(banned[0]) == {text_hash(text) for text in ("q0", "p0", "x", "y")}
    assert set(banned[1]) == {text_hash(text) for text in ("q1", "p1")}


def test_the_positive_is_drawn_by_seed_step_and_place() -> None:
    one = record(0, positives=tuple("abcdefgh"))
    drawn = [chosen_positive(one, 0, step, 5) for step in range(200)]
    assert drawn == [chosen_positive(one, 0, step, 5) for step in range(200)]
    assert set(drawn) == set(range(8))
    assert drawn != [chosen_positive(one, 1, step, 5) for step in range(200)]


def test_truncation_is_counted(tokenizer: Tokenizer) -> None:
    batch = build_batch([record(0, negatives=("n" * 50,))], tokenizer, BatchConfig(max_tokens=48), seed=0, step=0)
    assert batch.n_truncated == 1
    assert [len(ids) for ids in batch.sequences][2] == 48
    assert all(ids[-1] == tokenizer.eos_id for ids in batch.sequences)


@pytest.mark.parametrize("budget", [1, 5, 64, 1000])
def test_packing_keeps_every_sequence_once_within_the_budget(budget: int) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 40, (60,), generator=generator).tolist()
    sequences = [[row * 100 + i for i in range(length)] for row, length in enumerate(lengths)]
    pieces = pack(sequences, budget, torch.device("cpu"))
    assert sorted(row for piece in pieces for row in piece.rows.tolist()) == list(range(60))
    for piece in pieces:
        assert piece.cu_seqlens.dtype == torch.int32 and piece.cu_seqlens[-1] == len(piece.tokens)
        assert len(piece.tokens) <= budget or len(piece.rows) == 1
        assert piece.max_seqlen == piece.cu_seqlens.diff().max()
        for n, row in enumerate(piece.rows.tolist()):
            assert piece.tokens[piece.cu_seqlens[n] : piece.cu_seqlens[n + 1]].tolist() == sequences[row]
    if budget == 1000:
        assert len(pieces) == -(-sum(lengths) // 1000)
