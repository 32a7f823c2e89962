"""A training run may follow a folder that grows: new records enter at an epoch's border only, and are recorded."""

import json
from pathlib import Path

import pytest

from e5core.mixture import DataConfig, Mixture, Source, load_mixture
from e5core.synth.replies import Rejection
from e5core.synth.store import Store


def line(name: str) -> str:
    return json.dumps({"id": name, "query": f"q {name}", "pos": [f"p {name}"]}) + "\n"


def grow(folder: Path, shard: int, *names: str, torn: str = "") -> None:
    folder.mkdir(exist_ok=True)
    with (folder / f"{shard:05d}.jsonl").open("a") as file:
        file.write("".join(map(line, names)) + torn)


def config_of(*paths: Path, ratios: tuple[float, ...] = (), skip_broken: bool = False) -> DataConfig:
    ratios = ratios or (1.0,) * len(paths)
    sources = tuple(Source(path=str(path), ratio=ratio) for path, ratio in zip(paths, ratios, strict=True))
    return DataConfig(sources=sources, skip_broken=skip_broken)


def ids(mixture: Mixture, step: int, size: int) -> list[str]:
    return [record.id for record in mixture.batch(step, size)]


def drawn(mixture: Mixture, first: int, last: int) -> list[str]:
    """The ids of the records that a run has at these places, sorted."""
    return sorted(mixture.batch(place, 1)[0].id for place in range(first, last))


def test_growth_enters_at_the_border_and_is_recorded(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "records"
    grow(folder, 0, "a", "b", "c", "d", torn='{"query"')
    mixture, _ = load_mixture(config_of(folder), 1)
    assert mixture.n_records == mixture.epoch_size == 4
    mixture.batch(0, 3)
    (folder / "00000.jsonl").write_text("".join(map(line, "abcd")) + line("e"))
    grow(folder, 1, "f", "g", torn="{")
    assert drawn(mixture, 0, 4) == ["a", "b", "c", "d"]
    assert mixture.n_records == 4 and "new records" not in capfd.readouterr().err
    assert drawn(mixture, 4, 11) == ["a", "b", "c", "d", "e", "f", "g"] == drawn(mixture, 11, 18)
    assert "epoch 2 begins with 3 new records from 2 files" in capfd.readouterr().err
    epochs = mixture.state()["epochs"]
    assert [[Path(shard["path"]).name for shard in epoch] for epoch in epochs] == [
        ["00000.jsonl"], ["00000.jsonl", "00001.jsonl"], []]  # fmt: skip
    assert [mixture.n_epochs(n) for n in (2, 4, 11, 18)] == [0.5, 1.0, 2.0, 3.0]


def test_an_epoch_that_grew_holds_every_record_by_ratio_beside_a_file_s(tmp_path: Path) -> None:
    folder, file = tmp_path / "records", tmp_path / "x.jsonl"
    grow(folder, 0, *(f"f{i}" for i in range(4)))
    file.write_text("".join(line(f"x{i}") for i in range(6)))
    mixture, _ = load_mixture(config_of(folder, file, folder, ratios=(1, 0.5, 2)), 5)
    assert mixture.epoch_size == 4 + 3 + 8
    assert drawn(mixture, 0, 15)[:12] == sorted(f"f{i}" for i in range(4) for _ in range(3))
    grow(folder, 0, "f4", "f5")
    assert drawn(mixture, 15, 36)[:18] == sorted(f"f{i}" for i in range(6) for _ in range(3))
    assert mixture.epoch_size == 6 + 3 + 12


def test_a_resumed_mixture_gives_the_same_records_though_the_store_grew_meanwhile(tmp_path: Path) -> None:
    folder = tmp_path / "records"
    grow(folder, 0, "a", "b", "c")
    config = config_of(folder)
    mixture, _ = load_mixture(config, 1)
    ids(mixture, 0, 3)
    grow(folder, 0, "d")
    grow(folder, 1, "e", "f")
    first = [ids(mixture, step, 2) for step in range(4)]  # 8 of 9: into the second epoch
    kept = json.loads(json.dumps(mixture.state()))
    grow(folder, 1, "g", "h")  # between save and resume
    resumed, _ = load_mixture(config, 1, kept["epochs"])
    assert resumed.state() == kept
    steps = range(4, 20)
    expected = [ids(mixture, step, 2) for step in steps]
    assert [ids(resumed, step, 2) for step in steps] == expected
    assert [ids(resumed, step, 2) for step in range(4)] == first
    assert resumed.state() == mixture.state() != kept


CHANGES = {
    "rewritten": lambda file: file.write_text(file.read_text().replace("q a", "q z")),
    "cut": lambda file: file.write_text(file.read_text()[:-20]),
    "gone": Path.unlink,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_shard_is_refused_at_the_border_and_at_resume(tmp_path: Path, change: str) -> None:
    folder = tmp_path / "records"
    grow(folder, 0, "a", "b")
    grow(folder, 1, "c", "d")
    mixture, _ = load_mixture(config_of(folder), 1)
    kept = mixture.state()["epochs"]
    CHANGES[change](folder / "00000.jsonl")
    with pytest.raises(ValueError, match=r"00000\.jsonl no longer begins"):
        mixture.batch(1, 4)
    with pytest.raises(ValueError, match=r"00000\.jsonl no longer begins"):
        load_mixture(config_of(folder), 1, kept)


def test_an_empty_folder_and_a_broken_line_are_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "records"
    grow(folder, 0, torn="{")
    with pytest.raises(ValueError, match=r"records holds no usable record in a whole line"):
        load_mixture(config_of(folder), 1)
    grow(folder, 0, torn="broken\n")
    grow(folder, 1, "a")
    with pytest.raises(ValueError, match=r"00000\.jsonl:1: broken JSON"):
        load_mixture(config_of(folder), 1)
    mixture, _ = load_mixture(config_of(folder, skip_broken=True), 1)
    assert ids(mixture, 0, 1) == ["a"] and "skipped" in capfd.readouterr().err
    (folder / "00000.jsonl").unlink()
    mixture, _ = load_mixture(config_of(folder), 1)
    grow(folder, 1, torn="broken\n")
    with pytest.raises(ValueError, match=r"00001\.jsonl:2: broken JSON"):
        mixture.batch(1, 1)


def test_a_synth_store_can_be_followed_while_it_is_written(tmp_path: Path) -> None:
    with Store(tmp_path, shard_bytes=400) as store:

        def answer(*numbers: int) -> None:
            for i in numbers:
                response = {"S1": f"text {i}", "S2": f"same {i}", "S3": f"other {i}"}
                fields = {"kind": "sts", "task": "Match.", "language": "English", "params": {}, "response": response}
                store.add_record(f"k{i}", fields, model="m")
                store.add_reject(f"x{i}", Rejection("no_json"), kind="sts", model="m", text="prose")

        answer(0, 1, 2)
        mixture, _ = load_mixture(config_of(tmp_path / "records"), 1)
        answer(5, 4, 3)
        assert sorted(ids(mixture, 0, 3)) == ["k0", "k1", "k2"]
        assert sorted(ids(mixture, 1, 3) + ids(mixture, 2, 3)) == [f"k{i}" for i in range(6)]
