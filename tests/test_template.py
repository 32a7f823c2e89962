"""The three ways in which a query is shown to the model, through training, encoding, scoring and export."""

import json
from pathlib import Path

import numpy as np
import pytest
from models import save_embedder
from scoring import write_lines
from tiny_runs import CONFIG, ROOT, SYNTHETIC, equal_bitwise

from e5core import encode, evaluate
from e5core.encode import Encoder
from e5core.export import prompts
from e5core.mine import embed_queries
from e5core.mteb_tasks import instruct
from e5core.records import Record
from e5core.template import evaluation_task, query_text, template_of, training_task
from e5core.train import main

INSTRUCTION = "Given a claim, find documents that refute the claim"


def record(kind: str, **fields: object) -> Record:
    return Record(id="r", task=INSTRUCTION, query="q", positives=("p",), source="s", kind=kind, **fields)


def test_a_query_has_the_shape_that_the_paper_gives_it() -> None:
    assert query_text("Find it.", "what", "instruct") == "Instruct: Find it.\nQuery: what"
    assert query_text("query", "what", "prefix") == "query: what"
    assert query_text("", "{task}", "prefix") == "{task}" == query_text("any", "{task}", "bare")
    assert template_of("{task}: {query}") == "prefix"
    with pytest.raises(ValueError, match=r"trained with the template '\{task\} \{query\}', this version has"):
        template_of("{task} {query}")


@pytest.mark.parametrize(("kind", "symmetric", "prefix"), [
    ("long_short", False, "classify"),  # section 4.3, as reference/paper.md 2.3 has it
    ("short_long", False, "query"),
    ("short_short", False, "query"),
    ("long_long", False, "query"),
    ("plain", False, "query"),
    ("plain", True, ""),
    ("sts", True, ""),
    ("bitext", True, ""),
])  # fmt: skip
def test_the_prefix_goes_by_the_kind_of_the_record(kind: str, symmetric: bool, prefix: str) -> None:
    made = record(kind, symmetric=symmetric)
    assert training_task(made, "prefix") == prefix
    assert training_task(made, "instruct") == INSTRUCTION and training_task(made, "bare") == ""


@pytest.mark.parametrize(("kind", "prefix"), [
    ("retrieval", "query"), ("reranking", "query"), ("Retrieval", "query"), ("InstructionRetrieval", "query"),
    ("classification", "classify"), ("Clustering", "classify"), ("sts", ""), ("pair-classification", ""),
    ("PairClassification", ""), ("bitext", ""), ("BitextMining", ""), ("Summarization", ""),
])  # fmt: skip
def test_the_prefix_goes_by_the_kind_of_the_test_set(kind: str, prefix: str) -> None:
    assert evaluation_task(kind, INSTRUCTION, "prefix") == prefix
    assert evaluation_task(kind, INSTRUCTION, "instruct") == INSTRUCTION
    assert evaluation_task(kind, "classify", "prefix") == "classify" and evaluation_task(kind, "", "prefix") == ""
    assert evaluation_task(kind, INSTRUCTION, "bare") == ""


def test_mteb_s_tasks_are_told_the_prefix_of_their_kind() -> None:
    told = instruct("ArguAna", "Retrieval", {"query": "MTEB's"}, {}, "prefix")
    assert (told.instruction, told.on_documents) == ("query", False)
    assert instruct("ArguAna", "Retrieval", None, {"ArguAna": ""}, "prefix").instruction == ""
    assert instruct("STS17", "STS", None, {}, "prefix").instruction == ""
    assert instruct("ArguAna", "Retrieval", None, {}, "bare").instruction == ""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Train on the same records under each template, and with the data's own way of having no instructions."""
    folder = tmp_path_factory.mktemp("runs")
    model = save_embedder(folder / "model")
    retrieval = f'eval.report=[{{kind="sts", path="{ROOT}/data/sts/stsb-cc-en/dev.jsonl"}}]'
    changes = {
        "instruct": [],
        "prefix": ['batch.template="prefix"'],
        "bare": ['batch.template="bare"'],
        "no tasks": [f'data.sources=[{{path="{SYNTHETIC / "en_short_long_a.jsonl"}", tasks=[""]}}]'],
    }
    made = {}
    for name, overrides in changes.items():
        made[name], file = folder / name, folder / f"{name}.toml"
        file.write_text(
            CONFIG.format(run=folder / name, model=model, data=SYNTHETIC / "en_short_long_a.jsonl"), encoding="utf-8"
        )
        assert main([str(file), "train.steps=2", retrieval, *overrides]) == 0
    return made


def test_training_shows_what_the_template_says(runs: dict[str, Path]) -> None:
    shown = {name: (run / "tokens.txt").read_text().splitlines()[1] for name, run in runs.items()}
    query = shown["bare"].removeprefix("<s>")[:20]
    assert shown["prefix"].startswith(f"<s>query: {query}") and shown["instruct"].startswith("<s>Instruct: ")
    assert shown["no tasks"] == shown["bare"]


def test_bare_queries_and_sources_without_tasks_train_the_same_model(runs: dict[str, Path]) -> None:
    assert equal_bitwise(runs["bare"], runs["no tasks"], 2) and not equal_bitwise(runs["bare"], runs["instruct"], 2)


@pytest.mark.parametrize(("name", "task", "shown"), [
    ("prefix", "query", "query: what"), ("prefix", "classify", "classify: what"), ("prefix", None, "what"),
    ("bare", None, "what"), ("instruct", "Find it.", "Instruct: Find it.\nQuery: what"),
])  # fmt: skip
def test_an_encoder_shows_queries_as_its_run_did(
    name: str, task: str | None, shown: str, runs: dict[str, Path]
) -> None:
    encoder = Encoder.load(str(runs[name]))
    assert np.array_equal(encoder.encode(["what"], task), encoder.encode([shown]))
    assert encoder.selfcheck() > 1 - 1e-6


def test_mining_embeds_queries_as_training_showed_them(runs: dict[str, Path]) -> None:
    encoder = Encoder.load(str(runs["prefix"]))
    found = embed_queries(encoder, [record("long_short"), record("sts", symmetric=True), record("plain")])
    assert np.abs(found - encoder.encode(["classify: q", "q", "query: q"])).max() < 1e-6


def test_a_task_that_training_never_saw_is_refused(
    runs: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    texts = write_lines(tmp_path / "t.jsonl", [{"text": "a"}])
    output = ["--input", str(texts), "--output", str(tmp_path / "v.npy"), "--task", INSTRUCTION]
    for name, told in (("prefix", "the task must be none, query or classify"), ("bare", "without instructions")):
        assert encode.main([str(runs[name]), *output]) == 2 and told in capfd.readouterr().err
        sts = ["--sts", str(ROOT / "data/sts/stsb-cc-en/dev.jsonl"), "--task", f"stsb-cc-en-dev={INSTRUCTION}"]
        assert evaluate.main([str(runs[name]), *sts]) == 2 and told in capfd.readouterr().err


def test_evaluate_scores_a_run_as_its_training_did(runs: dict[str, Path], tmp_path: Path) -> None:
    """The kind of an STS set has no prefix, so the two runs are told nothing where instructions would change scores."""
    scores = {}
    for name in ("prefix", "bare", "instruct"):
        sts, out = str(ROOT / "data/sts/stsb-cc-en/dev.jsonl"), tmp_path / f"{name}.json"
        assert evaluate.main([str(runs[name]), "--sts", sts, "--out", str(out)]) == 0
        kept = json.loads((runs[name] / "evaluation.json").read_text())["after"]
        scores[name] = (kept["stsb-cc-en-dev/spearman"], json.loads(out.read_text())["stsb-cc-en-dev/spearman"])
        assert scores[name][0] == pytest.approx(scores[name][1], abs=1e-3)
    assert abs(scores["bare"][0] - scores["instruct"][0]) > 1e-2


def test_an_export_carries_the_prompts_of_its_run() -> None:
    assert prompts("prefix") == {"query": "query: ", "document": "", "classify": "classify: "}
    assert prompts("bare") == {"query": "", "document": ""}
    assert prompts("instruct")["sts_query"] == "Instruct: Retrieve semantically similar text.\nQuery: "
