"""Laws of mteb_model.py with MTEB itself, offline: its mock tasks, and our folders scored by both; skipped without.

MTEB must lie in a folder named site-packages, for dill pickles what does not, and fails.
"""

import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from models import save_embedder
from ranks import run_ranks
from scoring import DATA, WordEncoder, set_of

from e5core.distributed import ALONE, World
from e5core.encode import Encoder
from e5core.evaluate import main
from e5core.mteb_model import Identity, MtebModel, find_tasks, run_tasks
from e5core.mteb_tasks import instruct, read_table
from e5core.scores import evaluate
from e5core.testsets import EvalSet, read_bitext, read_classification, read_retrieval, read_sts
from e5core.weights import fingerprint

mteb = pytest.importorskip("mteb", reason="pip install -e '.[mteb]' brings MTEB")
datasets = pytest.importorskip("datasets")
mocks = pytest.importorskip("mteb.mocks.mock_tasks")
clusterings = pytest.importorskip("mteb.mocks.mock_tasks.clustering")
metas = pytest.importorskip("mteb.models.model_meta")

WHO = Identity(name="e5core/run", revision="step_1-0123456789ab", dim=2048, max_tokens=512, settings={})
STS, BITEXT = DATA / "sts" / "stsb-cc-en" / "test.jsonl", DATA / "bitext" / "tatoeba" / "deu-eng.jsonl"


class Counted(WordEncoder):
    """Embeds by three letters and a little noise, so that no two cosines are equal; fails on a text if told to."""

    def __init__(self, bad: str | None = None) -> None:
        super().__init__(dim=256, pattern=r"(?=(\w\w\w))")
        self.bad = bad

    def encode(self, texts: Sequence[str], task: str | None = None, normalize: bool = True) -> np.ndarray:
        if self.bad in texts:
            raise FloatingPointError(f"the embedding of {self.bad} is not finite")
        noise = [np.random.default_rng(zlib.crc32(text.encode())).normal(size=self.dim) for text in texts]
        vectors = super().encode(texts, task) + 0.01 * np.stack(noise).astype(np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True) if normalize else vectors


class Lost(mocks.MockSTSTask):
    """A task whose data cannot be had, until it can."""

    metadata = mocks.MockSTSTask.metadata.model_copy(update={"name": "Lost"})
    there = False

    def load_data(self, **ignored: object) -> None:
        if not self.there:
            raise OSError("no network")
        super().load_data()


def run(tasks: Sequence[object], folder: Path, **changes: object) -> tuple[dict, dict, int]:
    """Run tasks.  Returns scores, failures and how often texts were embedded."""
    encoder = changes.pop("encoder", None) or Counted()
    given = changes.pop("given", {})
    scores, failures = run_tasks({"own": tasks}, encoder.encode, ALONE, replace(WHO, **changes), folder, given)
    return scores, failures, len(encoder.calls)


def test_mock_run_passes_over_every_kind_of_task_of_text(tmp_path: Path) -> None:
    encoder = Encoder.load(str(save_embedder(tmp_path / "model")), dtype="float32")
    meta = metas.ModelMeta.create_empty({"name": WHO.name, "revision": WHO.revision})
    results = mteb.mock_run(MtebModel(encoder.encode, meta, {}))
    ran = {name: result for name, result in results.items() if result is not None}
    assert not {name: result.exception for name, result in ran.items() if hasattr(result, "exception")}
    kinds = {task.metadata.name: task.metadata.type for task in mteb.mocks.ALL_MOCK_TASK_TEST_GRID}
    assert {kinds[name] for name in ran} == set(read_table().kinds)


def test_the_groups_are_the_papers_tasks_and_mteb_tells_them_the_same() -> None:
    groups = find_tasks(list(read_table().groups), {})
    assert {name: len(tasks) for name, tasks in groups.items()} == {
        "mteb-en": 56,
        "beir": 15,
        "miracl": 1,
        "bucc-tatoeba": 2,
    }
    tasks = [task for tasks in groups.values() for task in tasks]
    for task in tasks:
        about = task.metadata
        told = instruct(about.name, about.type, "", {})
        assert told.source == "the paper's", about.name
        own = about.prompt["query"] if isinstance(about.prompt, dict) else about.prompt
        assert own is None or own.rstrip(".") == told.instruction.rstrip("."), about.name
        assert len(task.hf_subsets) == 1 or about.name in ("MIRACLRetrieval", "BUCC", "Tatoeba")
    assert [*find_tasks(["STS17", "BEIR", "STS17"], {})] == ["STS17", "BEIR"]


def test_names_that_are_none_pictures_and_instructions_for_other_tasks_are_refused() -> None:
    for names, given, said in (
        (
            ["SciFacts"],
            {},
            r"^--mteb: 'SciFacts' not found. Did you mean: 'SciFact'\? Or name a benchmark of MTEB, or a group: mteb",
        ),
        (["CIFAR10"], {}, "CIFAR10 is not of texts alone, but of image"),
        (["SciFact"], {"SciFast": "Find."}, r"unknown set 'SciFast'; known: SciFact; did you mean SciFact\?"),
    ):
        with pytest.raises(ValueError, match=said):
            find_tasks(names, given)


def test_what_has_a_result_is_not_run_again_and_mteb_reads_it(tmp_path: Path) -> None:
    tasks = [mocks.MockSTSTask(), mocks.MockRetrievalTask(), mocks.MockMultilingualRetrievalTask()]
    scores, failures, n_calls = run(tasks, tmp_path)
    assert not failures and n_calls and len(scores) == 3 + 2  # means of retrieval's two and of all
    both = [scores["MockRetrievalTask/ndcg_at_10"], scores["MockMultilingualRetrievalTask/ndcg_at_10"]]
    assert scores["own, 2 Retrieval/mean"] == pytest.approx(np.mean(both))
    assert scores["own, 3 tasks/mean"] == pytest.approx(np.mean([*both, scores["MockSTSTask/cosine_spearman"]]))
    assert run(tasks, tmp_path) == (pytest.approx(scores, abs=1e-3), {}, 0)  # files have 6 digits
    path = tmp_path / "results" / "e5core__run" / WHO.revision / "MockSTSTask.json"
    stored = json.loads(path.read_text())["scores"]["test"][0]["main_score"]
    assert 100 * stored == pytest.approx(scores["MockSTSTask/cosine_spearman"])
    [model] = mteb.ResultCache(tmp_path).load_results().model_results
    assert (model.model_name, model.model_revision) == (WHO.name, WHO.revision)
    assert {result.task_name for result in model.task_results} == {task.metadata.name for task in tasks}
    path.write_bytes(path.read_bytes()[:100])
    assert run(tasks, tmp_path) == (pytest.approx(scores, abs=1e-3), {}, 2)


def test_other_weights_settings_and_instructions_have_results_of_their_own(tmp_path: Path) -> None:
    tasks = [mocks.MockSTSTask()]
    for changes in (
        {},
        {"revision": "step_2-0123456789ab"},
        {"settings": {"max_tokens": 64}},
        {"given": {"MockSTSTask": "Find. " * 100}},
        {"given": {"MockSTSTask": ""}},
    ):
        assert run(tasks, tmp_path, **changes)[2] == 2
        assert run(tasks, tmp_path, **changes)[2] == 0
    encoder = Counted()
    run(tasks, tmp_path / "new", encoder=encoder, given={"MockSTSTask": "Find."})
    assert [task for _, task, _ in encoder.calls] == ["Find.", "Find."]


def test_a_task_that_fails_holds_up_no_other_and_runs_alone_next_time(tmp_path: Path) -> None:
    lost, sts = Lost(), mocks.MockSTSTask()
    scores, failures, _ = run([lost, sts], tmp_path)
    assert list(scores) == ["MockSTSTask/cosine_spearman"]
    assert failures == {"Lost": "Lost: no network"}
    lost.there = True
    scores, failures, n_calls = run([lost, sts], tmp_path)
    assert not failures and n_calls == 2 and "Lost/cosine_spearman" in scores


def test_a_task_of_tasks_has_no_result_until_all_its_parts_have(tmp_path: Path) -> None:
    whole = mocks.MockAggregatedTask()
    name = whole.metadata.name
    last = whole.metadata.tasks[-1]
    last.load_data()
    failing = Counted(last.dataset["default"]["test"]["queries"]["text"][0])
    last.unload_data()
    scores, failures, _ = run([whole], tmp_path, encoder=failing)
    assert not scores and name in failures
    assert not (tmp_path / "results" / "e5core__run" / WHO.revision / f"{name}.json").exists()
    scores, failures, _ = run([whole], tmp_path)
    assert not failures and 0 < scores[f"{name}/ndcg_at_10"] <= 100
    assert run([whole], tmp_path)[2] == 0


def test_a_score_is_of_the_subsets_that_are_asked_for_whatever_else_is_stored(tmp_path: Path) -> None:
    everything = mocks.MockMultilingualSTSTask()
    part = mocks.MockMultilingualSTSTask().filter_languages(["fra"])
    run([everything], tmp_path)
    path = tmp_path / "results" / "e5core__run" / WHO.revision / f"{part.metadata.name}.json"
    stored = json.loads(path.read_text())
    for scores in stored["scores"]["test"]:
        scores["main_score"] = {"eng": 0.25, "fra": 0.75}[scores["hf_subset"]]
    path.write_text(json.dumps(stored))
    who = f"{part.metadata.name} fra/cosine_spearman", f"{part.metadata.name}/cosine_spearman"
    scores, _, n_calls = run([part, everything, part], tmp_path)
    assert scores == {who[0]: 75.0, who[1]: 50.0, "own, 2 STS/mean": 62.5} and not n_calls


def test_the_command_line_writes_where_the_model_lies_and_shows_each_score(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    known = {"MockSTSTask": mocks.MockSTSTask, "Lost": Lost}
    monkeypatch.setattr(mteb, "get_task", lambda name: known[name]())
    model, out = save_embedder(tmp_path / "model"), tmp_path / "scores.json"
    arguments = [str(model), "--dtype", "float32", "--sts", str(STS), "--out", str(out), "--mteb", "MockSTSTask"]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    scores = json.loads(out.read_text())
    assert list(scores) == ["stsb-cc-en/spearman", "MockSTSTask/cosine_spearman"]
    assert shown == "".join(f"{name}  score {score:.2f}\n" for name, score in scores.items())
    [path] = (model / "mteb" / "results").rglob("MockSTSTask.json")
    assert path.parts[-5:-1] == ("e5core__model", fingerprint(model)[:12], "experiments", "dtype_float32")
    assert main([str(model), "--mteb", "MockSTSTask", "Lost", "--task", "Lost=Find.", "--max-tokens", "9"]) == 2
    captured = capsys.readouterr()
    assert captured.out.startswith("MockSTSTask/cosine_spearman  score ")
    assert "no score for Lost (why: above)" in captured.err and "instruction, yours: Find." in captured.err
    assert "texts were cut to 9 tokens" in captured.err


def local(kind: type, fill: Callable[[], object], **fields: object) -> object:
    """A task of MTEB of one of its mock kinds with data of ours."""

    class Local(kind):
        metadata = kind.metadata.model_copy(update={"name": "Local", "eval_splits": ["test"], **fields})

        def load_data(self, **ignored: object) -> None:
            self.dataset, self.data_loaded = fill(), True

    return Local()


def rows(**columns: Sequence[object]) -> Mapping[str, object]:
    return datasets.DatasetDict({"test": datasets.Dataset.from_dict(columns)})


def xquad() -> dict:
    read = read_retrieval(DATA / "retrieval" / "xquad-en")
    corpus = {"id": list(read.documents), "title": [""] * len(read.documents), "text": list(read.documents.values())}
    queries = {"id": list(read.queries), "text": list(read.queries.values())}
    held = {"corpus": corpus, "queries": queries}
    held = {name: datasets.Dataset.from_dict(columns) for name, columns in held.items()}
    return {"default": {"test": held | {"relevant_docs": read.judgements, "top_ranked": None}}}


def candidates() -> list[dict]:
    """Questions of XQuAD, each with the paragraphs that are judged and some that are not."""
    read, found = read_retrieval(DATA / "retrieval" / "xquad-en"), []
    for row, (query, judged) in enumerate(read.judgements.items()):
        others = [name for name in sorted(read.documents) if name not in judged][row % 7 :: 5][:20]
        texts = ([read.documents[name] for name in names] for names in (judged, others))
        found.append(dict(zip(("query", "positive", "negative"), (read.queries[query], *texts), strict=True)))
    return found


def reranked(lines: Sequence[dict]) -> dict:
    held = {"corpus": {"id": [], "title": [], "text": []}, "queries": {"id": [], "text": []}}
    ranked: dict[str, list[str]] = {}
    judged: dict[str, dict[str, int]] = {}
    for row, line in enumerate(lines):
        held["queries"]["id"].append(f"q{row}")
        held["queries"]["text"].append(line["query"])
        own = {f"{side}{row}-{i}": x for side in ("positive", "negative") for i, x in enumerate(line[side])}
        held["corpus"]["id"] += own
        held["corpus"]["text"] += own.values()
        held["corpus"]["title"] += [""] * len(own)
        ranked[f"q{row}"] = list(own)
        judged[f"q{row}"] = {name: int(name.startswith("positive")) for name in own}
    made = {name: datasets.Dataset.from_dict(columns) for name, columns in held.items()}
    return {"default": {"test": made | {"relevant_docs": judged, "top_ranked": ranked}}}


def translations() -> tuple[list[str], list[str], list[int]]:
    read = read_bitext(BITEXT)
    pairs = [*zip(read.first, read.second, strict=True), *zip(read.first, read.second[1:], strict=False)]
    return [x for x, _ in pairs], [y for _, y in pairs], [int(i < len(read.first)) for i in range(len(pairs))]


def both_scores(kind: str, tmp_path: Path) -> tuple[EvalSet, object, str, str]:
    """One of our sets, the same as MTEB's task, its metric, ours."""
    if kind == "sts":
        read = read_sts(STS)
        fill = partial(rows, sentence1=read.first, sentence2=read.second, score=read.scores)
        return EvalSet(kind="sts", path=str(STS)), local(mocks.MockSTSTask, fill), "cosine_spearman", "spearman"
    if kind == "bitext":
        read = read_bitext(BITEXT)
        fill = partial(rows, sentence1=read.first, sentence2=read.second)
        task = local(mocks.MockBitextMiningTask, fill, main_score="f1")
        return EvalSet(kind="bitext", path=str(BITEXT)), task, "f1", "f1"
    if kind == "retrieval":
        folder = DATA / "retrieval" / "xquad-en"
        task = local(mocks.MockRetrievalTask, xquad)
        return EvalSet(kind="retrieval", path=str(folder)), task, "ndcg_at_10", "ndcg@10"
    if kind == "pair-classification":
        first, second, labels = translations()
        lines = [{"sentence1": x, "sentence2": y, "label": z} for x, y, z in zip(first, second, labels, strict=True)]
        fill = partial(rows, sentence1=first, sentence2=second, labels=labels)
        task = local(mocks.MockPairClassificationTask, fill, main_score="cosine_ap")
        return set_of(kind, tmp_path / "pairs", lines), task, "cosine_ap", "ap"
    if kind == "reranking":
        lines = candidates()
        task = local(mocks.MockRerankingTask, partial(reranked, lines), main_score="map_at_1000")
        return set_of(kind, tmp_path / "xquad", lines), task, "map_at_1000", "map"
    read = read_classification(DATA / "classification" / "banking77")
    texts, labels = read.test_texts, read.test_labels
    lines = [{"text": text, "label": label} for text, label in zip(texts, labels, strict=True)]
    fill = partial(rows, sentences=[texts], labels=[labels])
    task = local(clusterings.MockClusteringTask, fill)
    return set_of("clustering", tmp_path / "banking77", lines), task, "v_measure", "v_measure"


@pytest.mark.parametrize("kind", ["sts", "bitext", "retrieval", "pair-classification", "reranking", "clustering"])
def test_our_own_scores_of_real_sets_are_mtebs(kind: str, tmp_path: Path) -> None:
    ours, task, metric, own = both_scores(kind, tmp_path)
    score = run([task], tmp_path)[0][f"Local/{metric}"]
    assert score == pytest.approx(evaluate(Counted(), [ours])[f"{ours.name}/{own}"], abs=1e-3)
    assert 5 < score < 99


def run_led(world: World, folder: Path) -> tuple[dict, list]:
    encoder = Counted()
    tasks = [mocks.MockRetrievalTask(), mocks.MockMultilingualClassificationTask()]
    return run_tasks({"own": tasks} if world.is_main else {}, encoder.encode, world, WHO, folder, {})[0], encoder.calls


def test_over_ranks_rank_0_alone_scores_and_all_embed(tmp_path: Path) -> None:
    (scores, calls), (nothing, others) = run_ranks(2, run_led, tmp_path / "two")
    assert calls == others and not nothing
    assert scores == run([mocks.MockRetrievalTask(), mocks.MockMultilingualClassificationTask()], tmp_path / "one")[0]
