"""The order of records is a pure function of (seed, step), without tails and by ratio."""

import json
from collections import Counter
from pathlib import Path

import pytest

from e5core.mixture import DataConfig, Mixture, Source, load_mixture
from e5core.records import Record


def records(name: str, n: int) -> list[Record]:
    return [Record(id=f"{name}{i}", task="", query="q", positives=("p",), source=name) for i in range(n)]


def test_an_epoch_holds_every_record_once_and_epochs_differ() -> None:
    mixture = Mixture([records("a", 10), records("b", 7)], [1, 1], seed=3)
    order = [r.id for step in range(17) for r in mixture.batch(step, 3)]  # 51 = 3 epochs of 17
    epochs = [order[i : i + 17] for i in (0, 17, 34)]
    ids = sorted(r.id for r in (*records("a", 10), *records("b", 7)))
    assert all(sorted(epoch) == ids for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_step_is_the_same_from_any_start() -> None:
    sources = [records("a", 10), records("b", 7)]
    first, again = Mixture(sources, [1, 0.5], seed=3), Mixture(sources, [1, 0.5], seed=3)
    steps = [first.batch(step, 4) for step in range(20)]
    assert [again.batch(step, 4) for step in (19, 0, 7)] == [steps[19], steps[0], steps[7]]
    assert [r.id for r in Mixture(sources, [1, 0.5], seed=4).batch(0, 4)] != [r.id for r in steps[0]]


def test_the_order_is_that_of_earlier_releases() -> None:
    mixture = Mixture([records("a", 10), records("b", 7)], [1, 0.5], seed=3)
    assert [r.id for r in mixture.batch(2, 8)] == ["a4", "a3", "b1", "b5", "b0", "a1", "a8", "a2"]


def test_ratios_give_shares_of_an_epoch() -> None:
    mixture = Mixture([records("a", 10), records("b", 10), records("c", 10)], [1, 0.3, 2.5], seed=0)
    assert mixture.epoch_size == 38
    epochs = [Counter(r.id for r in mixture.batch(e, 38)) for e in range(30)]
    for epoch in epochs:
        assert [sum(n for i, n in epoch.items() if i[0] == name) for name in "abc"] == [10, 3, 25]
        assert max(epoch.values()) == 3 and all(epoch[f"c{i}"] in (2, 3) for i in range(10))
    assert len({i for epoch in epochs for i in epoch if i[0] == "b"}) == 10  # another third each epoch


def test_sources_are_read_and_broken_lines_named(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text(json.dumps({"query": "q", "pos": ["p"]}) + "\n{broken\n")
    with pytest.raises(ValueError, match="x.jsonl:2"):
        load_mixture(DataConfig(sources=(Source(path=str(file)),)), 0)
    mixture, skipped = load_mixture(DataConfig(sources=(Source(path=str(file)),), skip_broken=True), 0)
    assert mixture.n_records == 1 and len(skipped) == 1 and "x.jsonl:2" in skipped[0]
