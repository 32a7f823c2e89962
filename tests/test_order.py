"""The order of stored rows: a bijection computed place by place; homogeneous batches lose and repeat nothing."""

import time
from collections import Counter

import numpy as np
import pytest
import torch
from models import save_embedder

from e5core.batches import BatchConfig, build_batch, chosen_negatives
from e5core.mixture import Mixture
from e5core.order import HomogeneousOrder, MixedOrder, permuted
from e5core.records import Record
from e5core.sources import Source
from e5core.tokenizer import Tokenizer


def records(name: str, n: int) -> list[Record]:
    return [Record(id=f"{name}{i}", task="", query=f"{name}q{i}", positives=("p",), source=name) for i in range(n)]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 97, 100, 101, 4096, 65537])
def test_a_permutation_is_a_bijection_of_its_own_for_every_name(n: int) -> None:
    places = np.arange(n)
    names = [(seed, epoch, stream) for seed in (0, 2**32 - 1) for epoch in (0, 7) for stream in (0, 5)]
    rows = [permuted(places, n, *name) for name in names]
    assert all(np.array_equal(np.sort(row), places) for row in rows)
    assert n < 97 or len({row.tobytes() for row in rows}) == len(names)
    for i in (0, n // 2, n - 1):
        assert permuted(places[i : i + 1], n, *names[3])[0] == rows[3][i]


def test_the_rows_at_five_million_cost_what_the_first_ones_do_and_are_scattered() -> None:
    n, size = 10_000_000, 2048
    started = time.process_time()
    rows = permuted(np.arange(5_000_000, 5_000_000 + size), n, 3, 0, 1)
    assert time.process_time() - started < 0.5
    assert len(set(rows.tolist())) == size
    # Of scattered rows the mean is n/2 and that of the steps n/3: 5 standard errors
    assert abs(rows.mean() / n - 0.5) < 5 * 0.289 / size**0.5
    assert abs(np.abs(np.diff(rows)).mean() / n - 1 / 3) < 5 * 0.236 / size**0.5
    counts = np.bincount(rows * 64 // n, minlength=64)
    assert ((counts - size / 64) ** 2 / (size / 64)).sum() < 120  # chi-square, 63 degrees: p = 2e-5


def test_a_mixed_epoch_holds_its_counts_and_every_row_by_them() -> None:
    order, lengths, counts = MixedOrder(1), [10, 300, 6], [10, 100, 15]
    for _ in range(3):
        order.begin_epoch(lengths, counts)
    epochs = [Counter(order.rows(step, 125)) for step in range(3)]
    for epoch in epochs:
        assert [sum(n for (s, _), n in epoch.items() if s == source) for source in range(3)] == counts
        assert all(epoch[0, row] == 1 for row in range(10)) and all(epoch[2, row] in (2, 3) for row in range(6))
        assert max(n for (s, _), n in epoch.items() if s == 1) == 1
    assert epochs[0] != epochs[1] != epochs[2]
    assert [order.rows(step, 25) for step in (14, 3)] == [order.rows(2, 125)[100:], order.rows(0, 125)[75:100]]


def test_homogeneous_batches_have_one_source_and_each_row_once_an_epoch_by_ratio() -> None:
    lengths, counts, size = [40, 9, 3], [40, 18, 3], 8
    order = HomogeneousOrder(5, size)
    n_epochs = 16
    for _ in range(n_epochs):
        order.begin_epoch(lengths, counts)
    assert order.starts[-1] == sum(n_epochs * n // size for n in counts) * size
    batches = [order.rows(step, size) for step in range(order.starts[-1] // size)]
    assert all(len({source for source, _ in batch}) == 1 for batch in batches)
    drawn = Counter(row for batch in batches for row in batch)
    for source, n in enumerate(lengths):  # 16 epochs' counts are whole batches of 8
        assert {drawn[source, row] for row in range(n)} == {n_epochs * counts[source] // n}
    sources = [batch[0][0] for batch in batches]
    assert sources != sorted(sources) and {sources.index(source) < 40 for source in range(3)} == {True}
    assert order.rows(11, 3) == batches[11][:3]


def test_a_homogeneous_mixture_is_the_same_from_any_start() -> None:
    sources = [records("a", 30), records("b", 7)]

    def fresh() -> Mixture:
        return Mixture(sources, [1, 2], 3, homogeneous=4)

    steps = [fresh().batch(step, 4) for step in range(30)]
    again = fresh()
    assert [again.batch(step, 4) for step in (29, 0, 7)] == [steps[29], steps[0], steps[7]]
    assert all(len({record.source for record in batch}) == 1 for batch in steps)
    assert {batch[0].source for batch in steps} == {"a", "b"} and again.epoch_size == 44
    assert 2 < again.n_epochs(30 * 4) < 3


def test_weights_share_out_an_epoch_as_long_as_all_sources() -> None:
    settings = [Source(path="a", weight=3), Source(path="b", weight=1)]
    mixture = Mixture([records("a", 10), records("b", 30)], [1, 1], 0, settings=settings)
    epoch = Counter(record.id for record in mixture.batch(0, 40))
    assert sum(n for name, n in epoch.items() if name[0] == "a") == 30 and mixture.epoch_size == 40
    assert {epoch[f"a{i}"] for i in range(10)} == {3}


def test_a_closed_source_s_queries_and_candidates_are_closed_in_the_batch(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    tokenizer = Tokenizer.load(save_embedder(tmp_path_factory.mktemp("model")))
    settings = [Source(path="a"), Source(path="b", in_batch=False)]
    mixture = Mixture([records("a", 4), records("b", 4)], [1, 1], 0, settings=settings)
    drawn = mixture.batch(0, 8)
    relations = build_batch(drawn, tokenizer, BatchConfig(), seed=0, step=0).relations
    open_ = torch.tensor([record.source == "a" for record in drawn])
    assert torch.equal(relations.query_open, open_) and torch.equal(relations.candidate_open, open_[relations.owner])


def test_random_negatives_are_drawn_evenly_by_seed_step_and_place() -> None:
    record = Record(id="r", task="", query="q", positives=("p",), negatives=tuple("abcdefgh"), source="s")
    random, top = BatchConfig(negatives=3, choice="random"), BatchConfig(negatives=3)
    assert chosen_negatives(record, top, 0, 0, 0) == [0, 1, 2]
    drawn = [chosen_negatives(record, random, 1, step, place) for step in range(40) for place in range(20)]
    assert drawn == [chosen_negatives(record, random, 1, step, place) for step in range(40) for place in range(20)]
    assert all(len(set(places)) == 3 and places == sorted(places) for places in drawn)
    counts = Counter(place for places in drawn for place in places)
    assert all(abs(counts[place] - 300) < 5 * (800 * 3 / 8 * 5 / 8) ** 0.5 for place in range(8))
    assert chosen_negatives(record, BatchConfig(negatives=15, choice="random"), 1, 0, 0) == list(range(8))
    assert chosen_negatives(record, BatchConfig(negatives=0, choice="random"), 1, 0, 0) == []
