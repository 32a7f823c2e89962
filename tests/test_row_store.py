"""Stores, and the command that shows and builds them: the same records as the source's, whole or not there."""

import gzip
import json
import os
import shutil
from collections import Counter
from pathlib import Path

import pytest
from models import save_embedder
from scoring import ROOT

from e5core.config import load_config
from e5core.data import main
from e5core.mixture import DataConfig, load_mixture
from e5core.records import Record, read_records
from e5core.row_store import StoredRows, build_store, store_folder
from e5core.run import Config
from e5core.sources import Notes, Source

REAL = ROOT / "data/synthetic/en_short_long_a.jsonl"
PAPER = {  # arXiv 2401.00368, Table 14, typed from reference tables: ratio and the instructions' first words
    "eli5_question_answer": (0.1, ["Provided a user question"]),
    "hotpot_qa": (1, ["Given a multi-hop question"]),
    "fever": (1, ["Given a claim"]),
    "miracl": (1, ["Given a question, retrieve Wikipedia"]),
    "mrtydi": (1, ["Given a question, retrieve Wikipedia"]),
    "msmarco_passage": (0.5, ["Given a web search query, retrieve relevant passages"]),
    "msmarco_document": (0.2, ["Given a web search query, retrieve relevant documents"]),
    "nq": (1, ["Given a question, retrieve Wikipedia"]),
    "allnli": (1, ["Given a premise", "Retrieve semantically similar"]),
    "squad": (1, ["Retrieve Wikipedia passages"]),
    "trivia_qa": (1, ["Retrieve Wikipedia passages"]),
    "quora_duplicates": (0.1, ["Given a question, retrieve questions", "Find questions"]),
    "dureader": (1, ["Given a Chinese search query"]),
    "t2ranking": (0.5, ["Given a Chinese search query"]),
}


def build(folder: Path, source: Source, *, skip_broken: bool = False) -> Notes:
    return build_store(folder, source, skip_broken=skip_broken, show=lambda records: records)


def stored(tmp_path: Path, source: Source) -> DataConfig:
    build(store_folder(tmp_path / "stores", source), source)
    return DataConfig(sources=(source,), store=str(tmp_path / "stores"))


def test_a_store_holds_the_records_as_they_were_read(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl.gz"
    extra = {"query": "Straße \u2028東京", "pos": ["p"], "neg": ["n", "m"], "scores": [0.5, 1, 2], "lang": "de"}
    extra |= {"symmetric": True, "in_batch": False, "id": "own"}
    path.write_bytes(gzip.compress(REAL.read_bytes() + json.dumps(extra).encode()))
    build(tmp_path / "store", Source(path=str(path)))
    expected, _ = read_records([path])
    rows = StoredRows(tmp_path / "store")
    assert list(rows) == expected and len(rows) == len(expected) and isinstance(rows[0], Record)
    build(tmp_path / "again", Source(path=str(path)))
    assert StoredRows(tmp_path / "again").digest == rows.digest
    with pytest.raises(IndexError):
        rows[len(rows)]


def test_training_reads_the_store_though_the_source_is_gone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.jsonl"
    shutil.copy(REAL, path)
    config = stored(tmp_path, Source(path=str(path), tasks=("A.", "B."), in_batch=False))
    path.unlink()
    mixture, _ = load_mixture(config, 1)
    assert "from the store" in (said := capfd.readouterr().err) and "not here to compare" in said
    expected, _ = read_records([REAL])
    drawn = [record for step in range(2) for record in mixture.batch(step, len(expected))]
    epochs = [drawn[: len(expected)], drawn[len(expected) :]]
    for epoch in epochs:
        assert Counter(record.query for record in epoch) == Counter(record.query for record in expected)
    assert [r.id for r in epochs[0]] != [r.id for r in epochs[1]]
    assert {(record.task, record.in_batch) for record in drawn} == {("A.", False), ("B.", False)}
    resumed, _ = load_mixture(config, 1, mixture.state()["epochs"])
    assert resumed.batch(1, len(expected)) == epochs[1] and resumed.state() == mixture.state()
    assert len(json.dumps(mixture.state())) < 200


def test_a_stale_or_damaged_store_is_refused_and_a_touched_source_is_not(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    shutil.copy(REAL, path)
    source = Source(path=str(path))
    config = stored(tmp_path, source)
    os.utime(path, (1, 1))
    load_mixture(config, 0)
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"a", b"b", 1))
    with pytest.raises(ValueError, match=r"is stale: .*x\.jsonl has changed since; run python -m e5core\.data build"):
        load_mixture(config, 0)
    path.write_bytes(whole)
    rows = store_folder(tmp_path / "stores", source) / "rows.jsonl"
    rows.write_bytes(rows.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is damaged"):
        load_mixture(config, 0)


def test_rows_that_were_left_out_make_a_store_stale_for_who_refuses_them(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(REAL.read_bytes() + b"{broken\n")
    source, store = Source(path=str(path)), tmp_path / "stores"
    with pytest.raises(ValueError, match=r"x\.jsonl:\d+: broken JSON"):
        build(store_folder(store, source), source)
    assert list(store.iterdir()) == []  # nothing half made
    assert len(build(store_folder(store, source), source, skip_broken=True).skipped) == 1
    load_mixture(DataConfig(sources=(source,), store=str(store), skip_broken=True), 0)
    with pytest.raises(ValueError, match="1 broken rows were left out"):
        load_mixture(DataConfig(sources=(source,), store=str(store)), 0)


@pytest.fixture(scope="module")
def e5_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that configs/e5_mistral_full.toml names, with real texts, in a folder to stand in."""
    folder = tmp_path_factory.mktemp("here")
    (folder / "data/e5").mkdir(parents=True)
    (folder / "runs/synth").mkdir(parents=True)
    shutil.copy(REAL, folder / "runs/synth/records.jsonl")
    texts = [(r.query, r.positives[0], r.negatives[0]) for r in read_records([REAL])[0][:40]]
    for i, name in enumerate(PAPER):
        rows = [{"query": q, "positive": f"{i}. {p}", "negative": n} for q, p, n in texts]
        (folder / f"data/e5/{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    save_embedder(folder / "model")
    return folder


def test_the_paper_s_mixture_is_shipped_whole() -> None:
    config = load_config(Config, ROOT / "configs/e5_mistral_full.toml")
    public = {Path(source.path).stem: source for source in config.data.sources[1:]}
    assert list(public) == list(PAPER)
    for name, (ratio, starts) in PAPER.items():
        source = public[name]
        assert source.ratio == ratio and source.url and len(source.tasks) == len(starts)
        assert all(task.startswith(start) for task, start in zip(source.tasks, starts, strict=True))
    assert (config.batch.size, config.batch.negatives, config.batch.max_tokens) == (2048, 1, 512)
    small = load_config(Config, ROOT / "configs/e5_mistral_synthetic_msmarco.toml").data.sources
    assert small == (config.data.sources[0], public["msmarco_passage"])
    assert load_config(Config, ROOT / "configs/e5_mistral_synthetic.toml").data.sources == small[:1]
    for name, sources in (("public", config.data.sources[1:]), ("msmarco", small[1:])):
        assert load_config(Config, ROOT / f"configs/e5_mistral_{name}.toml").data.sources == sources


def test_check_shows_what_the_model_will_see_and_what_is_missing(
    e5_folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(e5_folder)
    command = ["check", str(ROOT / "configs/e5_mistral_full.toml"), "backbone.path=model", "tokenizer.eos_id=258"]
    assert main(command) == 0
    said = capfd.readouterr().err
    assert "15 of 15 sources are there; nothing is missing" in said
    assert "format e5, 40 rows" in said and "4 of           40 rows" in said
    for task in ("Given a premise", "Retrieve semantically similar text"):  # two instructions, in turn
        assert f"Instruct: {task}" in said
    query, ids = said.partition("   query, ")[2].split("\n")[:2]
    assert "Instruct: " in query and json.loads(ids)[-1] == 258 and len(json.loads(ids)) == int(query.split()[0])
    assert said.count("   negative, ") == 15 * 3
    hidden = Path("data/e5/fever.jsonl")
    hidden.rename("fever.hidden")
    try:
        assert main(command) == 1
    finally:
        Path("fever.hidden").rename(hidden)
    said = capfd.readouterr().err
    assert "missing: no such file: data/e5/fever.jsonl" in said and "14 of 15 sources are there" in said
    for name, n_sources in (("public", 14), ("msmarco", 1)):
        assert main(["check", str(ROOT / f"configs/e5_mistral_{name}.toml"), *command[2:]]) == 0
        assert f"{n_sources} of {n_sources} sources are there" in capfd.readouterr().err
        with monkeypatch.context() as elsewhere:
            elsewhere.chdir(e5_folder / "data")
            assert (
                main(["check", str(ROOT / f"configs/e5_mistral_{name}.toml"), f"backbone.path={e5_folder / 'model'}"])
                == 1
            )
        assert "missing: no such file: data/e5/msmarco_passage.jsonl" in capfd.readouterr().err


def test_build_makes_every_store_once_and_training_reads_them(
    e5_folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(e5_folder)
    file = str(ROOT / "configs/e5_mistral_full.toml")
    assert main(["build", file]) == 2 and "data.store names no folder" in capfd.readouterr().err
    assert main(["build", file, "data.store=stores"]) == 0
    assert len(list(Path("stores").iterdir())) == 15 and "40 rows of the format e5" in capfd.readouterr().err
    assert main(["build", file, "data.store=stores"]) == 0
    assert capfd.readouterr().err.count("is up to date") == 15
    fever = Path("data/e5/fever.jsonl")
    fever.write_text(fever.read_text().split("\n", 1)[1])
    assert main(["build", file, "data.store=stores"]) == 0
    said = capfd.readouterr().err
    assert said.count("is up to date") == 14 and "built again: data/e5/fever.jsonl has changed" in said
    config = load_config(Config, Path(file), ["data.store=stores"])
    mixture, _ = load_mixture(config.data, 0, homogeneous=8)
    counts = Counter(record.source for step in range(20) for record in mixture.batch(step, 8))
    assert all(n % 8 == 0 for n in counts.values()) and len(counts) > 5
