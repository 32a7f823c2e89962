"""The report's page is whole, says what the run's files and model say, runs nothing of the data, and fits a phone."""

import json
import math
import re
import shutil
import struct
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from browser import look
from models import save_embedder
from scoring import write_beir, write_lines
from sklearn.metrics import roc_auc_score
from tiny_runs import CONFIG, SYNTHETIC

from e5core.drawing import MOST_POINTS, histogram, line_chart, nice_ticks, number
from e5core.encode import Encoder
from e5core.event_file import write_events
from e5core.records import Record
from e5core.report import main
from e5core.similarities import LEFT_OUT, MOST_CHARACTERS, POSITIVE, retrieval_sample, separation, training_sample
from e5core.testsets import EvalSet, Retrieval, read_retrieval
from e5core.train import main as train_main

NASTY = "</pre><script>document.title='ran'</script><img src=x onerror=\"document.title='ran'\">"
VOID = {"meta", "br", "wbr", "img", "input", "link", "hr"}
SECTIONS = [
    "Scores before and after", "What was trained on what", "Training", "Memory, planned and measured",
    "The trained model", "Worst retrievals", "The run's own files",
]  # fmt: skip
OUTSIDE = ("src", "href", "srcset", "data", "action", "formaction", "poster", "background", "xlink:href")


class Page(HTMLParser):
    """Checks that elements nest, and keeps tags, attributes, headings and the text that a reader sees."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.sections: list[str] = []
        self.text = ""
        self.feed(file.read_text(encoding="utf-8"))
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["h2"]:
            self.sections.append(data)
        self.text += "" if "style" in self.open else data


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose records, test set and name hold what would run if it were not escaped."""
    folder = tmp_path_factory.mktemp("report")
    lines = (SYNTHETIC / "en_sts.jsonl").read_text(encoding="utf-8").splitlines()[:15]
    nasty = {"task": NASTY, "query": f"query {NASTY}", "pos": [f"pos {NASTY}"], "neg": [f"neg {NASTY}"]}
    data = write_lines(folder / "data.jsonl", [nasty, *lines])
    documents = {f"d{i}": f"{NASTY} document {i} {'x' * i}" for i in range(6)}
    queries = {f"q{i}": f"{NASTY} question {i} {'y' * i}" for i in range(4)}
    judgements = [f"q{i}\td{i}\t1" for i in range(4)]
    beir = write_beir(folder / "beir<b>", documents, queries, judgements)
    text = CONFIG.format(run=folder / "run <i>x", model=save_embedder(folder / "model"), data=data)
    text += f'[eval]\nreport = [{{kind = "retrieval", path = "{beir}"}}]\n'
    (folder / "config.toml").write_text(text)
    assert train_main([str(folder / "config.toml"), "train.steps=4", "train.save_every=0", "eval.max_tokens=200"]) == 0
    assert main([str(folder / "run <i>x")]) == 0
    return folder / "run <i>x"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / "report.html").unlink()
    return tmp_path / "run"


def test_the_page_is_well_formed_whole_and_asks_for_nothing(trained: Path) -> None:
    page, text = Page(trained / "report.html"), (trained / "report.html").read_text(encoding="utf-8")
    assert page.sections == SECTIONS
    assert not [(name, value) for name, value in page.attributes if name in OUTSIDE]
    assert "url(" not in text and "@import" not in text
    assert not re.search(r'(points|[xy][12]?|c[xy]|width|height)="[^"]*(nan|inf)', text)
    assert page.tags.count("svg") == 8 and page.tags.count("figcaption") == 8
    assert [p.name for p in trained.iterdir() if "tmp" in p.name] == []


def test_texts_of_the_data_are_shown_and_never_markup(trained: Path) -> None:
    page = Page(trained / "report.html")
    assert not {"script", "img"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert f"{NASTY} question" in page.text and f"{NASTY} document" in page.text and "run <i>x" in page.text
    assert "beir<b>/ndcg@10" in page.text
    policy = next(value for name, value in page.attributes if name == "content" and "default-src" in str(value))
    assert policy.startswith("default-src 'none'") and "script" not in policy


def test_the_page_says_what_the_files_say(trained: Path) -> None:
    text = Page(trained / "report.html").text
    metrics = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    scores = json.loads((trained / "evaluation.json").read_text())
    assert "Finished: 4 steps." in text and f"{number(metrics[0]['loss'])} at step 1" in text
    for each in metrics:
        assert f"step {each['step']}: {number(each['grad_norm'])}" in text  # the columns' titles
    for name, before in scores["before"].items():
        change = scores["after"][name] - before
        assert re.search(rf"{before:.1f}\s*{scores['after'][name]:.1f}\s*{re.escape(f'{change:+.1f}')}", text), name
    predicted, measured = re.search(
        r"memory: ([\d,]+) MiB predicted, ([\d,]+) MiB", (trained / "plan.txt").read_text()
    ).groups()
    assert f"predicted, as measured below{predicted}measured" in text and f"){measured}" in text
    assert "ratio 11616" in text and "The same records as at the newest checkpoint" in text  # 16 records, 16 an epoch
    assert "batch.max_tokens48512" in text and "lora.dropout" not in text.partition("config.toml: every")[0]
    assert "rank 4, alpha 32, dropout 0.1 on wq, wk" in text


def test_similarities_and_the_worst_retrieval_are_the_model_s(trained: Path) -> None:
    text = Page(trained / "report.html").text
    encoder = Encoder.load(str(trained))
    assert "selfcheckpassed: 10 fixed texts" in text
    [path] = trained.parent.glob("beir*")
    sets, eval_set = read_retrieval(path), EvalSet(kind="retrieval", path=str(path))
    documents = encoder.encode(list(sets.documents.values()))
    said: dict[float, tuple[str, str]] = {}  # by how far the expected document is above the others
    positives, others = [], []
    for i in range(4):
        [query] = encoder.encode([sets.queries[f"q{i}"]], task=eval_set.instruction)
        similar = (documents @ query).tolist()
        rest = similar[:i] + similar[i + 1 :]
        place = 1 + sum(value > similar[i] for value in rest)
        said[similar[i] - max(rest)] = f"in place {place} of 6; cosine {similar[i]:.3f}", f"question {i}"
        positives.append(similar[i])
        others += rest
    shown = text.partition("Worst retrievals")[2].partition("The run's own files")[0]
    rows = [said[margin] for margin in sorted(said)]
    found = [shown.index(part) for row in rows for part in reversed(row)]  # each query before its places, worst first
    n_wrong = sum("place 1 " not in place for place, _ in rows)
    assert found == sorted(found) and f"Of 4 queries of beir<b>, {n_wrong} found another of 6 candidates first" in shown
    area = roc_auc_score([1] * 4 + [0] * 20, positives + others)
    assert f"A positive pair is above another pair in {100 * area:.1f}% of" in text.partition("4 queries, 6 cand")[2]


def test_an_unfinished_run_is_shown_as_far_as_it_came(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    scored = json.dumps(json.loads(lines[1]) | {"eval": {"dev/spearman": 61.5}}) + "\n"
    (run / "metrics.jsonl").write_text(lines[0] + scored + lines[2][:20])
    shutil.rmtree(run / "step_4")
    for name in ("evaluation.json", "plan.txt", "tokens.txt"):
        (run / name).unlink()
    assert main([str(run)]) == 0
    page = Page(run / "report.html")
    assert page.sections == [each.replace(", planned and measured", "") for each in SECTIONS if "Worst" not in each]
    assert "dev/spearman (%)" in page.text and "step 2: 61.5" in page.text
    for said in ("Unfinished: 2 of 4 steps", "The run has not come to it yet", "no plan.txt", "No checkpoint yet"):
        assert said in page.text
    (run / "PREEMPTED").write_text('{"step": 2}')
    assert main([str(run)]) == 0
    assert "Stopped by SIGTERM after step 2" in Page(run / "report.html").text


def test_without_its_model_or_records_a_run_is_shown_and_the_reason_named(
    run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = (run / "config.toml").read_text()
    (run / "config.toml").write_text(config.replace("data.jsonl", "gone.jsonl"))
    assert main([str(run), "--no-model"]) == 0
    text = Page(run / "report.html").text
    assert "Left out, as asked for by --no-model" in text and "gone.jsonl" in text.partition("Not counted: ")[2][:300]
    (run / "step_4" / "adapter_model.safetensors").write_bytes(b"torn")
    assert main([str(run)]) == 0
    damaged = "adapter_model.safetensors has 4 bytes"
    assert damaged in Page(run / "report.html").text.partition("It could not be used: ")[2]
    assert damaged in capfd.readouterr().err.partition("the trained model: ")[2]


@pytest.mark.parametrize(("gone", "said"), [
    ("", "RUN: no such file or folder"),
    ("config.toml", "no run folder, it has no config.toml; name the folder that train.run names"),
    ("metrics.jsonl", "no finished step in it, so there is nothing to report; let e5core.train do a step"),
])  # fmt: skip
def test_what_is_missing_is_named_and_nothing_written(
    run: Path, capfd: pytest.CaptureFixture[str], gone: str, said: str
) -> None:
    shutil.rmtree(run) if not gone else (run / gone).unlink()
    assert main([str(run), "--no-model"]) == 2
    error = capfd.readouterr().err
    assert said in error and str(run) in error and len(error.splitlines()) == 1
    assert not (run / "report.html").exists()


def test_a_broken_line_of_the_metrics_is_named(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (run / "metrics.jsonl").write_text('{"step": 1}\n{"loss"\n')
    assert main([str(run)]) == 2
    assert "metrics.jsonl:2: broken JSON" in capfd.readouterr().err


@pytest.mark.parametrize(("value", "shown"), [
    (0, "0"), (0.0005333, "0.000533"), (5.333e-5, "5.33e-5"), (0.0338, "0.0338"), (0.5, "0.5"), (6.690, "6.69"),
    (17.026, "17"), (99.96, "100"), (1770.4, "1,770"), (-0.25, "-0.25"), (2e-7, "2e-7"),
])  # fmt: skip
def test_numbers_have_three_digits(value: float, shown: str) -> None:
    assert number(value) == shown


@pytest.mark.parametrize(("low", "high"), [(0, 8.9), (0, 1), (0, 1e-7), (-3.2, 11), (0.41, 0.99), (0, 0), (5, 5)])
def test_ticks_enclose_what_is_drawn(low: float, high: float) -> None:
    ticks = nice_ticks(low, high)
    assert ticks[0] <= low and ticks[-1] >= high and 2 <= len(ticks) <= 7
    steps = np.diff(ticks)
    assert np.allclose(steps, steps[0]) and f"{steps[0]:.1e}"[:3] in ("1.0", "2.0", "2.5", "5.0")


@pytest.mark.parametrize("log", [False, True])
def test_a_long_run_is_drawn_with_few_points_and_no_spike_is_lost(log: bool) -> None:
    points = [(step, 1.0 + math.sin(step) ** 2) for step in range(1, 5001)]
    points[2500] = (2501, 500.0)
    chart = line_chart(points, name="x", log=log)
    assert chart.count("<rect") == MOST_POINTS and len(chart) < 60_000
    assert re.search(r"<title>step 2,5\d\d: \S+ \(\S+ to 500\)</title>", chart)
    heights = [float(pair.split(",")[1]) for pair in re.search(r'class="band" points="(.*?)"', chart)[1].split()]
    top, second, *_ = sorted(heights)
    assert top < 40 < 140 < second  # of a field from 8 to 162


def test_one_step_and_a_constant_are_drawn() -> None:
    for points in ([(7, 0.0)], [(1, 3.0), (2, 3.0)], [(1, -1.0), (2, 0.0)]):
        for log in (False, True):
            assert "nan" not in line_chart(points, name="x", log=log)
    assert histogram({"a": [0.5, 0.5], "b": []}, name="x").count("<polygon") == 1


def test_separation_is_the_area_under_the_roc_curve() -> None:
    generator = np.random.default_rng(0)
    positives, others = generator.integers(3, 12, 50) / 10, generator.integers(0, 9, 300) / 10
    labels = [1] * 50 + [0] * 300
    expected = roc_auc_score(labels, np.concatenate([positives, others]))
    assert separation(positives, others) == pytest.approx(expected, abs=1e-12)


def record(query: str, positives: tuple[str, ...], negatives: tuple[str, ...] = (), **more: object) -> Record:
    return Record(id="x", task="T", query=query, positives=positives, negatives=negatives, source="s", **more)


def test_a_training_sample_takes_no_true_answer_for_a_negative() -> None:
    records = [
        record("q0", ("a", "b"), ("n",)),
        record("q1", ("b",), ("q0",)),
        record("q2", ("c",), in_batch=False),
        record("q3", ("d",), kind="sts", symmetric=True),
    ]
    sample = training_sample(records, ("sts",), 100)
    assert sample.candidates == ["a", "n", "b", "q0", "c", "Instruct: T\nQuery: d"]
    assert sample.relation.tolist() == [[1, 2, 3, 3, 3, 0], [0, 0, 1, 2, 3, 0], [3, 3, 3, 3, 1, 3], [0, 0, 0, 0, 3, 1]]


def test_samples_are_bounded_by_characters() -> None:
    long = "x" * 20_000
    assert (
        len(training_sample([record(f"{i}", (long,)) for i in range(40)], (), 1000).queries) == MOST_CHARACTERS // 1001
    )
    assert len(training_sample([record(f"{i}", (long,)) for i in range(20)], (), 10**6).queries) == 2
    documents = {f"d{i}": long for i in range(300)}
    texts = Retrieval({"q": "q", "r": "r"}, documents, {"q": {"d7": 1}, "r": {"d8": 0}})
    sample = retrieval_sample(EvalSet(kind="retrieval", path="x"), texts, 1000)
    assert sample.shown_queries == ["q"] and len(sample.candidates) == (MOST_CHARACTERS - 1) // 1000
    assert (sample.relation == POSITIVE).sum() == 1 and not (sample.relation == LEFT_OUT).any()


def test_an_event_file_is_to_the_byte_what_tensorboard_writes(tmp_path: Path) -> None:
    steps = [(1.5, 1, {"loss": 2.5, "eval/x": 40.0}), (1e9 + 0.25, 300, {"loss": 0.125})]
    write_events(tmp_path / "events", steps)
    written = (  # by tensorboard 2.21.0's RecordWriter and Event
        "0f000000000000006d532b091a0d627261696e2e4576656e743a32fc985129290000000000000037ff5f0009000000000000f83f10012a1c"
        "0a0b0a046c6f737315000020400a0d0a066576616c2f781500002042aec84af91b000000000000001a0d9e13090000200065cdcd4110ac02"
        "2a0d0a0b0a046c6f7373150000003ef7efba96"
    )
    assert (tmp_path / "events").read_bytes().hex() == written
    assert [p.name for p in tmp_path.iterdir()] == ["events"]


def test_tensorboard_reads_the_metrics_back(run: Path, tmp_path: Path) -> None:
    reason = "needs tensorboard: pip install tensorboard"
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason=reason)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[-1]) | {"eval": {"dev/spearman": 81.5}}
    (run / "metrics.jsonl").write_text("".join(line + "\n" for line in [*lines[:-1], json.dumps(last)]))
    assert main([str(run), "--no-model", "--tensorboard", str(tmp_path / "tb")]) == 0
    events = accumulator.EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert {"loss", "lr", "grad_norm", "tokens_per_s", "eval/dev/spearman"} <= set(events.Tags()["scalars"])
    losses = [struct.unpack("<f", struct.pack("<f", json.loads(line)["loss"]))[0] for line in lines]
    assert [(event.step, event.value) for event in events.Scalars("loss")] == list(enumerate(losses, start=1))
    [score] = events.Scalars("eval/dev/spearman")
    assert (score.step, score.value) == (4, 81.5)
    assert score.wall_time == pytest.approx((run / "metrics.jsonl").stat().st_mtime)


def test_in_chromium_it_renders_complains_of_nothing_and_fits_desk_and_phone(trained: Path, tmp_path: Path) -> None:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    views = look(chromium, trained / "report.html", [(1280, "light"), (390, "light"), (390, "dark")])
    for view in views:
        assert view.width <= view.inner_width and view.complaints == []
        assert view.title == "run <i>x: e5core run"  # no script of the data has changed it
        assert view.requests == [(trained / "report.html").as_uri()]
        assert view.png.startswith(b"\x89PNG")
    assert [view.inner_width for view in views] == [1280, 390, 390]
    assert len(views[0].png) > 50_000 and views[1].png != views[2].png
