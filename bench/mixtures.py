"""The paper's question in small: which data, in which batches?  `python -m bench.mixtures --data DIR --work DIR`.

Every cell is a run of e5core.train on the quickstart's model, with its settings and as many records (25 steps of 16),
scored once by e5core.evaluate on dev sets cut small enough for a CPU. Cells differ in what the records are:

    synthetic    the quickstart's LLM-written records, in its ratios
    labelled     equal parts of SNLI, FEVER, SQuAD sentences and MedQuAD; only SNLI's rows have hard negatives
    mixed        half of either

Which cells decide what (docs/results.md has what they said):

    is it the ratio?             mixed by rows, 7% synthetic; mixed, 80% synthetic
    is it time?                  the cells of 75 steps, which leave the first plateau behind
    the missing hard negatives?  synthetic, no hard negatives (takes them away); mixed, mined negatives (gives them)
    easy in-batch negatives?     mixed, labelled apart: labelled queries see only their own candidates, which are
                                 offered to nobody; beside synthetic, batches of 8, which is as many synthetic records a
                                 step. With mined negatives, so that labelled rows still teach something
    are small batches to blame   mixed, homogeneous batches of 64, beside mixed, batches of 64
    for homogeneous ones?

A cell that has a line in WORK/results.jsonl, of the same --set, is not run again, so a stopped bench goes on. Mined
negatives, and with them a teacher's scores, come from the run "synthetic" of seed 0; a merged cell is the mean of the
runs "synthetic" of its seed and the next.
"""

import argparse
import gzip
import json
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.roofline import record

QUICKSTART = Path("configs/quickstart.toml")
SYNTHETIC = {
    "en_sts": 1.0,
    "en_short_short": 1.0,
    "en_long_short": 0.25,
    "en_short_long_a": 0.3,
    "en_short_long_b": 0.3,
}
LABELLED = {  # instruction by set: that of arXiv 2401.00368, table 13, or one made after it
    "snli-dev": "Given a premise, retrieve a hypothesis that is entailed by the premise",
    "fever-dev": "Given a claim, retrieve documents that support or refute the claim",
    "squad-sentences": "Given a question, retrieve Wikipedia passages that answer the question",
    "medquad": "Given a medical question, retrieve passages that answer the question",
}
MINED = ("fever-dev", "squad-sentences", "medquad")  # those without hard negatives
ROWS = 300  # of each labelled set, drawn once: a third of them is a run
STEPS, BATCH = 25, 16
MAX_TOKENS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One mixture.  synthetic: its part of the records, the rest being labelled."""

    synthetic: float
    composition: str = "mixed"
    in_batch: bool = True  # of the labelled sets
    mined: bool = False  # labelled rows with a hard negative each
    steps: int = STEPS
    batch: int = BATCH
    merged: bool = False  # no training: the mean of two seeds' runs on synthetic records
    settings: tuple[str, ...] = ()  # section.key=value

    @property
    def distilled(self) -> bool:
        """Whether each of its rows needs a teacher's scores."""
        return any(setting.startswith("loss.distillation=") for setting in self.settings)


CELLS = {
    "synthetic": Cell(synthetic=1.0),
    "labelled": Cell(synthetic=0.0),
    "mixed": Cell(synthetic=0.5),
    "mixed, homogeneous batches": Cell(synthetic=0.5, composition="homogeneous"),
    "mixed by rows, 7% synthetic": Cell(synthetic=0.07),
    "mixed, 80% synthetic": Cell(synthetic=0.8),
    "labelled, mined negatives": Cell(synthetic=0.0, mined=True),
    "mixed, mined negatives": Cell(synthetic=0.5, mined=True),
    "mixed, homogeneous, mined negatives": Cell(synthetic=0.5, composition="homogeneous", mined=True),
    "labelled, homogeneous batches": Cell(synthetic=0.0, composition="homogeneous"),
    "synthetic, no hard negatives": Cell(synthetic=1.0, settings=("batch.negatives=0",)),
    "mixed, labelled apart": Cell(synthetic=0.5, in_batch=False),
    "mixed, labelled apart, mined negatives": Cell(synthetic=0.5, in_batch=False, mined=True),
    "synthetic, batches of 8": Cell(synthetic=1.0, batch=8),
    "synthetic, 75 steps": Cell(synthetic=1.0, steps=75),
    "labelled, 75 steps": Cell(synthetic=0.0, steps=75),
    "mixed, 75 steps": Cell(synthetic=0.5, steps=75),
    "mixed, homogeneous batches, 75 steps": Cell(synthetic=0.5, composition="homogeneous", steps=75),
    "mixed, mined negatives, 75 steps": Cell(synthetic=0.5, mined=True, steps=75),
    "mixed, batches of 64": Cell(synthetic=0.5, batch=64),
    "mixed, homogeneous batches of 64": Cell(synthetic=0.5, composition="homogeneous", batch=64),
    "synthetic, no instructions": Cell(synthetic=1.0, settings=('batch.template="bare"',)),
    "labelled, no instructions": Cell(synthetic=0.0, settings=('batch.template="bare"',)),
    "mixed, no instructions": Cell(synthetic=0.5, settings=('batch.template="bare"',)),
    "synthetic, prefixes": Cell(synthetic=1.0, settings=('batch.template="prefix"',)),
    "mixed, prefixes": Cell(synthetic=0.5, settings=('batch.template="prefix"',)),
    "synthetic, mean pooling": Cell(synthetic=1.0, settings=('backbone.pooling="mean"',)),
    "synthetic, weighted mean pooling": Cell(synthetic=1.0, settings=('backbone.pooling="weighted_mean"',)),
    "synthetic, bidirectional": Cell(synthetic=1.0, settings=("backbone.causal=false",)),
    "synthetic, matryoshka": Cell(synthetic=1.0, settings=("loss.matryoshka=[64, 576]",)),
    "synthetic, merged": Cell(synthetic=1.0, merged=True),
    "labelled, distilled": Cell(
        synthetic=0.0, mined=True, settings=("loss.distillation=1.0", "loss.teacher_temperature=0.02")
    ),
}


def main() -> None:
    """Run the cells that have no result yet."""
    arguments = _parser().parse_args()
    work: Path = arguments.work
    if not (work / "dev").is_dir():
        cut_dev_sets(arguments.data, work / "dev.new")
        (work / "dev.new").rename(work / "dev")
    if not (work / "labelled").is_dir():
        draw_labelled(arguments.data / "train", work / "labelled.new")
        (work / "labelled.new").rename(work / "labelled")
    for seed in arguments.seeds:
        for name in arguments.cells:
            run_cell(name, seed, work, arguments.set, arguments.dimensions)


def run_cell(name: str, seed: int, work: Path, given: Sequence[str] = (), dimensions: int | None = None) -> None:
    """Train and score one cell, and record it; nothing where its line is there.

    given: settings of all cells.  dimensions: of the vectors that are scored; None: all.
    """
    results = work / "results.jsonl"
    lines = results.read_text(encoding="utf-8").splitlines() if results.is_file() else []
    known = [(x["cell"], x["seed"], x.get("set", []), x.get("dimensions")) for x in map(json.loads, lines)]
    if (name, seed, list(given), dimensions) in known:
        return
    cell, run = CELLS[name], work / "runs" / run_name(name, seed, given)
    started = time.monotonic()
    if not cell.merged:
        train(cell, seed, run, work, given)
    elif not run.is_dir():
        for n in (seed, seed + 1):
            run_cell("synthetic", n, work, given)
        parts = (str(work / "runs" / run_name("synthetic", n, given)) for n in (seed, seed + 1))
        run_module("e5core.merge", str(run), *parts)
    scores = evaluate(str(run), work, run / "dev.json", dimensions)
    row = {"bench": "mixtures", "cell": name, "seed": seed, "steps": cell.steps, "batch": cell.batch}
    row |= {"set": list(given), "seconds": round(time.monotonic() - started), "scores": scores}
    row |= {} if dimensions is None else {"dimensions": dimensions}
    record(row, torch.device("cpu"), results)


def train(cell: Cell, seed: int, run: Path, work: Path, given: Sequence[str]) -> None:
    """Train one cell; nothing where its last checkpoint is there."""
    if cell.mined and not (work / "mined").is_dir():
        mine(work, given)
    config = run.with_name(f"{run.name}.toml")  # the name holds dots
    run.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(config_text(cell, work), encoding="utf-8")
    if not (run / f"step_{cell.steps}").is_dir():
        changes = (f"train.run={run}", f"train.seed={seed}", "train.overwrite=true", *cell.settings, *given)
        run_module("e5core.train", str(config), *changes)


def run_name(name: str, seed: int, given: Sequence[str]) -> str:
    """Return the name of a cell's run folder."""
    return re.sub("[^a-z0-9.]+", "_", "-".join([name, *given, str(seed)]))


def config_text(cell: Cell, work: Path) -> str:
    """Write the quickstart's config with the cell's sources and batches."""
    head, _, rest = QUICKSTART.read_text(encoding="utf-8").partition("[[data.sources]]")
    tables = "[batch]" + rest.partition("[batch]")[2].partition("[[eval.report]]")[0]
    head = head.replace("epochs = 1.0", f"steps = {cell.steps}")
    tables = tables.replace('composition = "mixed"', f'composition = "{cell.composition}"')
    tables = tables.replace("size = 16 ", f"size = {cell.batch} ")
    return head + "".join(map(_source_text, sources(cell, work))) + tables


def sources(cell: Cell, work: Path) -> Iterator[dict[str, object]]:
    """Yield the cell's [[data.sources]]: ratios that make the epoch the run's records."""
    n_records = cell.steps * cell.batch
    for name, ratio in SYNTHETIC.items():
        if cell.synthetic:
            ratio *= cell.synthetic * n_records / (STEPS * BATCH)
            yield {"path": f"data/synthetic/{name}.jsonl", "ratio": ratio}
    for name, task in LABELLED.items():
        if cell.synthetic < 1:
            mined = cell.mined and (name in MINED or cell.distilled)
            path = work / ("mined" if mined else "labelled") / f"{name}.jsonl"
            ratio = (1 - cell.synthetic) * n_records / len(LABELLED) / ROWS
            yield {"path": str(path), "ratio": ratio, "in_batch": cell.in_batch, "tasks": [task]}


def _source_text(source: dict[str, object]) -> str:
    return "[[data.sources]]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in source.items()) + "\n"


def evaluate(model: str, work: Path, out: Path, dimensions: int | None) -> dict[str, float]:
    """Score a model on the dev sets, queries shown as in its training."""
    dev = work / "dev"
    sets = [
        *("--retrieval", *(str(dev / name) for name in RETRIEVAL)),
        *("--sts", str(dev / "stsb-cc-en" / "dev.jsonl")),
        *("--classification", str(dev / "banking77")),
    ]
    options = [] if dimensions is None else ["--dimensions", str(dimensions)]
    run_module("e5core.evaluate", model, *sets, *options, "--max-tokens", str(MAX_TOKENS), "--out", str(out))
    scores: dict[str, float] = json.loads(out.read_text(encoding="utf-8"))
    return scores


def mine(work: Path, given: Sequence[str]) -> None:
    """Give each labelled row a hard negative of its own set, found and scored by the run on synthetic records."""
    run_cell("synthetic", 0, work, given)
    model, new = work / "runs" / run_name("synthetic", 0, given), work / "mined.new"
    new.mkdir(exist_ok=True)
    for name in LABELLED:
        rows = read_rows(work / "labelled" / f"{name}.jsonl")
        corpus = new / f"{name}.corpus"
        write_rows(corpus, [{"text": text} for text in sorted({row["pos"][0] for row in rows})])
        files = ("--queries", str(work / "labelled" / f"{name}.jsonl"), "--out", str(new / f"{name}.jsonl"))
        limits = ("--n", "1", "--relative-margin", "0.05", "--max-tokens", str(MAX_TOKENS))
        run_module("e5core.mine", str(model), "--corpus", str(corpus), *files, *limits)
    new.rename(work / "mined")


RETRIEVAL = {"scifact-small": (50, 150), "nq-open-oracle-small": (80, 200), "xquad-en": (80, 150)}  # queries, documents
N_PAIRS, N_INTENTS, PER_INTENT = 250, 20, 8


def cut_dev_sets(data: Path, out: Path) -> None:
    """Cut the dev sets small."""
    for name, (n_queries, n_documents) in RETRIEVAL.items():
        cut_retrieval(data / "retrieval" / name, out / name, n_queries, n_documents)
    write_rows(out / "stsb-cc-en" / "dev.jsonl", read_rows(data / "sts" / "stsb-cc-en" / "dev.jsonl")[:N_PAIRS])
    for split in ("train", "test"):
        rows = read_rows(data / "classification" / "banking77" / f"{split}.jsonl")
        intents = sorted({row["label"] for row in rows})[:N_INTENTS]
        chosen = [row for label in intents for row in [row for row in rows if row["label"] == label][:PER_INTENT]]
        write_rows(out / "banking77" / f"{split}.jsonl", chosen)


def cut_retrieval(source: Path, target: Path, n_queries: int, n_documents: int) -> None:
    """Cut a BEIR folder to its first queries, what answers them, and the first of the other documents."""
    (target / "qrels").mkdir(parents=True, exist_ok=True)
    header, *lines = (source / "qrels" / "test.tsv").read_text(encoding="utf-8").splitlines()
    queries = read_rows(source / "queries.jsonl")[:n_queries]
    kept = {query["_id"] for query in queries}
    lines = [line for line in lines if line.split("\t")[0] in kept]
    answers = {line.split("\t")[1] for line in lines}
    documents = sorted(read_rows(source / "corpus.jsonl"), key=lambda row: row["_id"] not in answers)[:n_documents]
    (target / "qrels" / "test.tsv").write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    write_rows(target / "queries.jsonl", queries)
    write_rows(target / "corpus.jsonl", documents)


def draw_labelled(train: Path, out: Path) -> None:
    """Draw ROWS rows of each labelled set."""
    for name in LABELLED:
        with gzip.open(train / name / "train.jsonl.gz", "rt", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        write_rows(out / f"{name}.jsonl", random.Random(0).sample(rows, ROWS))


def read_rows(path: Path) -> list[dict[str, str]]:
    """Read JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_rows(path: Path, rows: Sequence[object]) -> None:
    """Write JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def run_module(module: str, *arguments: str) -> None:
    """Run python -m MODULE ARGUMENTS."""
    subprocess.run([sys.executable, "-m", module, *arguments], check=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.mixtures", description="Train on mixtures and compare.")
    parser.add_argument(
        "--data", metavar="DIR", type=Path, required=True, help="retrieval/, sts/, classification/, train/"
    )
    parser.add_argument("--work", metavar="DIR", type=Path, required=True, help="runs, cut sets and results.jsonl")
    parser.add_argument("--cells", nargs="+", default=list(CELLS)[:4], choices=CELLS, help="(the first four)")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="of all cells, e.g. backbone.dtype=bfloat16"
    )
    parser.add_argument("--dimensions", type=int, metavar="D", help="score the first D numbers of each vector")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="(0 1 2)")
    return parser


if __name__ == "__main__":
    main()
