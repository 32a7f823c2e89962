"""One page about a run: `python -m e5core.report RUN` writes RUN/report.html, which needs nothing but itself.

What was trained on what, the scores before and after, the curves, memory as planned and as measured come from the run's
files (run_page.py). How similar positives and negatives are, the worst retrievals and the selfcheck need the trained
model: it embeds two samples of about 7,500 tokens, a minute for SmolLM2-135M on 2 CPU cores; `--no-model` leaves them
out. Paths in the config are looked up from the current folder, as training does. `--tensorboard DIR` writes the metrics
as an event file too.
"""

import argparse
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from e5core import checkpoint
from e5core.batches import CHARACTERS
from e5core.config import read_json, write_whole
from e5core.distributed import log, log_error
from e5core.drawing import histogram
from e5core.event_file import write_events
from e5core.mixture import Mixture, load_mixture, stored_rows
from e5core.page import Markup, escaped, facts, figure, joined, key, page, section, tag
from e5core.run_page import RunFolder, appendix, curves, head, memory, read_run, scores, trained
from e5core.similarities import (
    HARD_NEGATIVE,
    MOST_EXAMPLES,
    OTHER,
    POSITIVE,
    Retrieved,
    Sample,
    cosines,
    retrieval_sample,
    retrieved,
    separation,
    training_sample,
)
from e5core.sources import files_of
from e5core.template import SHAPES
from e5core.testsets import read_retrieval
from e5core.text_encoder import GOLDEN_TEXTS, Encoder, ShownEncoder, describe_device

MOST_BYTES = 2**28  # of source files that are read into memory for a page
N_WORST = 6
SHOWN_CHARACTERS = 600  # of a text
GROUPS = {POSITIVE: "query and its positive", HARD_NEGATIVE: "query and its hard negative", OTHER: "query and another"}


def report(path: Path, *, with_model: bool = True) -> Path:
    """Write a run's page.  Returns its file, RUN/report.html.

    Raises FileNotFoundError for no folder, no run or no finished step, ValueError for a file that cannot be read.
    What else is missing (records, checkpoint, base model) is named on the page.
    """
    run = read_run(path)
    mixture, note = _records(run)
    if with_model:
        model = _with_model(run, mixture)
    else:
        lead = "Left out, as asked for by --no-model: similarities, worst retrievals and the selfcheck."
        model = section("The trained model", lead)
    written = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    parts = (
        head(run, mixture), scores(run), trained(run, mixture, note), curves(run), memory(run), model, appendix(run),
        tag("footer", f"Written {written} by python -m e5core.report; nothing on this page is loaded from elsewhere."),
    )  # fmt: skip
    write_whole(path / "report.html", page(f"{path.resolve().name}: e5core run", *parts))
    return path / "report.html"


def _records(run: RunFolder) -> tuple[Mixture | None, str]:
    """Read the training records as the run did.  Returns them, None where that fails, and what is to be said of it."""
    config, steps = run.config, checkpoint.steps_of(run.path)
    try:
        sources = [source for source in config.data.sources if stored_rows(config.data, source) is None]
        n_bytes = sum(file.stat().st_size for source in sources for file in files_of(source))
        if n_bytes > MOST_BYTES:
            return None, f"Not counted: the files have {n_bytes / 2**20:,.0f} MiB; data.store makes them quick to open."
        homogeneous = config.batch.size if config.batch.composition == "homogeneous" else None
        begun = checkpoint.begun_epochs(run.path)
        mixture, _ = load_mixture(config.data, config.train.seed, begun, homogeneous=homogeneous)
        if not steps:
            return mixture, "As the files are now; no checkpoint says what they were."
        state = read_json(checkpoint.step_folder(run.path, steps[-1]) / "state.json")
    except (OSError, ValueError) as error:
        log(f"training records: {error}")
        return None, f"Not counted: {error}"
    same = state.get("data") == mixture.digest
    return mixture, f"{'The same records' if same else 'OTHER RECORDS'} as at the newest checkpoint, by their hash."


def _with_model(run: RunFolder, mixture: Mixture | None) -> Markup:
    """Make the parts that need the trained model, or one that says why it cannot be used."""
    title = "The trained model"
    if not checkpoint.steps_of(run.path):
        return section(title, "No checkpoint yet, so there are no similarities, retrievals and selfcheck to show.")
    try:
        encoder = Encoder.load(str(run.path))
        checked = _selfcheck(encoder)
        found, missing = [], []
        for name, sample in _samples(run, mixture, CHARACTERS * encoder.max_tokens):
            if isinstance(sample, str):
                missing.append(tag("p", f"{name}: {sample}"))
                continue
            log(f"embedding {len(sample.queries)} queries and {len(sample.candidates)} candidates of {name}")
            found.append((name, sample, cosines(sample, ShownEncoder(encoder).encode)))
    except (OSError, ValueError, FloatingPointError, MemoryError) as error:
        log(f"the trained model: {error}")
        return section(title, f"It could not be used: {error}")
    lead = "Cosines of pairs in a small sample. Look for little overlap: what overlaps cannot be told apart. A grey "
    lead += "heap far to the right says that all texts lie in one direction, and only differences count."
    charts = [_histogram(*each) for each in found]
    parts = [section(title, lead, tag("div", *charts, checked, css="grid"), *missing)]
    return joined(parts + [_worst(*each) for each in found[-1:]])


def _samples(run: RunFolder, mixture: Mixture | None, max_chars: int) -> Iterator[tuple[str, Sample | str]]:
    """Yield samples by their names, or why there is none: training examples, then the first retrieval set."""
    config = run.config
    if mixture is not None:
        size = config.batch.size if config.batch.composition == "homogeneous" else mixture.epoch_size
        records = mixture.batch(0, min(MOST_EXAMPLES, size))
        told = (config.batch.instruct_documents, max_chars, config.batch.template)
        yield "training examples", training_sample(records, *told)
    for eval_set in chain(config.eval.report, config.eval.sets):
        if eval_set.kind == "retrieval":
            try:
                texts = read_retrieval(Path(eval_set.path))
                yield eval_set.name, retrieval_sample(eval_set, texts, max_chars, config.batch.template)
            except (OSError, ValueError) as error:
                yield eval_set.name, str(error)
            return


def _selfcheck(encoder: Encoder) -> Markup:
    least, allowed = encoder.selfcheck(), 1 - encoder.golden_tolerance
    passed = least >= allowed
    verdict = tag("b", "passed" if passed else "FAILED", css="good" if passed else "bad")
    told = "Library, file or machine differ from those of training: do not compare these vectors with stored ones."
    if passed:
        told = "Run python -m e5core.encode RUN --selfcheck wherever the model goes."
    return facts({
        "selfcheck": joined([verdict, f": {len(GOLDEN_TEXTS)} fixed texts, embedded anew and held against the vectors "
                             f"that training stored. Lowest cosine {least:.7f}, allowed {allowed:.7g}. {told}"]),
        "vectors": f"{encoder.model.backbone.config.dim:,} numbers, of length 1",
        "query template": tag("code", SHAPES[encoder.template]),
        "longest text": f"{encoder.max_tokens:,} tokens; longer ones are cut",
        "here": f"{describe_device(encoder.device)}",
    })  # fmt: skip


def _histogram(name: str, sample: Sample, similar: np.ndarray) -> Markup:
    values = {kind: similar[sample.relation == kind] for kind in GROUPS}
    lines = [
        f"{GROUPS[kind]}: {len(found):,} pairs, mean {np.mean(found):.3f}" if len(found) else ""
        for kind, found in values.items()
    ]
    caption = f"{len(sample.queries)} queries, {len(sample.candidates)} candidates; each colour adds up to 100%. "
    rest = np.concatenate([values[HARD_NEGATIVE], values[OTHER]])
    if len(rest):
        share = separation(values[POSITIVE], rest)
        caption += f"A positive pair is above another pair in {100 * share:.1f}% of all comparisons."
    title = f"Cosines in {name}"
    groups = {GROUPS[kind]: found.tolist() for kind, found in values.items()}
    return figure(title, histogram(groups, name=title), joined([caption, key(lines)]))


def _worst(name: str, sample: Sample, similar: np.ndarray) -> Markup:
    """Show the queries whose expected candidate was beaten by most."""
    found = retrieved(sample, similar)
    n_wrong = sum(each.place > 1 for each in found)
    lead = f"Of {len(found)} queries of {name}, {n_wrong} found another of {len(sample.candidates)} candidates first. "
    lead += (
        "Below are the worst, or the closest calls. Look for what they share: a wrong label (the other answers too), "
    )
    lead += "a kind of question that training lacks, or an answer behind the cut."
    return section("Worst retrievals", lead, *(_miss(sample, each) for each in found[:N_WORST]))


def _miss(sample: Sample, each: Retrieved) -> Markup:
    sides = (
        (f"expected, in place {each.place} of {each.n_candidates}; cosine {each.expected_cosine:.3f}", each.expected),
        (f"{'found first' if each.place > 1 else 'the next one'}; cosine {each.first_cosine:.3f}", each.first),
    )
    texts = [joined([tag("h3", title), _text("p", sample.candidates[candidate])]) for title, candidate in sides]
    return tag(
        "article",
        _text("blockquote", sample.shown_queries[each.query]),
        tag("div", *(tag("div", t) for t in texts), css="texts"),
        css="card miss",
    )


def _text(name: str, text: str) -> Markup:
    """Show a text of the data, cut where it is long, in the direction of its own script."""
    kept = re.sub(r"\s\S{0,20}$", "", text[:SHOWN_CHARACTERS])  # not half a word
    cut = text if len(text) <= SHOWN_CHARACTERS else kept + " …"
    return Markup(f'<{name} dir="auto">{escaped(cut or "(empty)")}</{name}>')


def tensorboard(run: RunFolder, folder: Path) -> Path:
    """Write the metrics as TensorBoard's event file.  Returns it, FOLDER/events.out.tfevents.e5core.

    The last step is as old as metrics.jsonl; the others lie before it by the seconds that steps took.
    """
    folder.mkdir(parents=True, exist_ok=True)
    left_s = sum(line.get("seconds", 0.0) for line in run.metrics)
    ended_s, steps = (run.path / "metrics.jsonl").stat().st_mtime, []
    for line in run.metrics:
        left_s -= line.get("seconds", 0.0)
        steps.append((ended_s - left_s, line["step"], dict(_scalars(line, ""))))
    file = folder / "events.out.tfevents.e5core"
    write_events(file, steps)
    return file


def _scalars(value: Mapping[str, Any], above: str) -> Iterator[tuple[str, float]]:
    """Yield the numbers of a line and of its nested tables, by tags with a / between levels."""
    for name, each in value.items():
        if isinstance(each, Mapping):
            yield from _scalars(each, f"{above}{name}/")
        elif isinstance(each, int | float) and name != "step":
            yield f"{above}{name}", float(each)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.  Returns the exit status: 0, or 2 with one line on stderr for what a user can mend."""
    parser = argparse.ArgumentParser(
        prog="python -m e5core.report",
        description="Write RUN/report.html, one self-contained page about a training run, finished or not.",
        epilog="The model's parts take about a minute for SmolLM2-135M on 2 CPU cores, and much longer for 7B.",
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="the folder that train.run named")
    parser.add_argument("--no-model", action="store_true", help="leave out what needs the trained model")
    parser.add_argument("--tensorboard", metavar="DIR", type=Path, help="write the metrics as an event file there too")
    arguments = parser.parse_args(argv)
    try:
        file = report(arguments.run, with_model=not arguments.no_model)
        log(f"wrote {file}")
        if arguments.tensorboard is not None:
            log(f"wrote {tensorboard(read_run(arguments.run), arguments.tensorboard)}")
    except (ValueError, OSError) as error:
        log_error(f"e5core.report: {error}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
