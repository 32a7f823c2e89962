"""What a run came to: OUT/report.json, and the same in tables.

Diversity and lengths are of the first SAMPLE records by key, which is a random sample, since keys are hashes.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from e5core.config import write_whole
from e5core.records import parse_object, read_lines
from e5core.synth.checks import count_words, spoken_in
from e5core.synth.generate import Run
from e5core.synth.languages import Languages
from e5core.synth.ledger import TRILLION, Spent

SAMPLE = 10_000
BORDERS = (5, 10, 20, 50, 100, 200, 400)  # of the histogram of words


def make_report(run: Run, n_written: int, left_out: Mapping[str, int]) -> dict[str, Any]:
    """Count what is in the folder.

    n_written, left_out: of outputs.write_outputs.
    Returns JSON values; distinct_n is the share of different ones among all runs of n words (arXiv 1510.03055).
    """
    counts = run.store.counts()
    accepted = [count for count in counts if count.stream == "records"]
    tables: dict[str, Counter[str]] = {name: Counter() for name in ("kind", "language", "model")}
    for count in accepted:
        for name, table in tables.items():
            table[getattr(count, name)] += count.n
    rejected: dict[str, Counter[str]] = defaultdict(Counter)
    for count in counts:
        if count.stream == "rejects":
            rejected[count.model][count.reason] += count.n
    path = run.out / "records.jsonl"
    sample = [parse_object(raw, f"{path}:{line}") for line, raw in islice(read_lines(path), SAMPLE)]
    return {
        "wanted": run.config.synth.n_records,
        "accepted": run.store.n_records,
        "written": n_written,
        "left_out": dict(left_out),
        "records": {f"by_{name}": dict(table.most_common()) for name, table in tables.items()},
        "tasks": {kind: run.store.n_tasks(kind) for kind, found in run.plan.kinds.items() if found.brainstorm},
        "rejected": {model: dict(reasons.most_common()) for model, reasons in rejected.items()},
        "spent": {model: _amounts(spent) for model, spent in run.ledger.spent_by_model().items()},
        "lost_reservations": run.ledger.n_lost,
        "sample": _texts_report(sample, run.plan.languages),
    }


def write_report(report: Mapping[str, Any], out: Path) -> None:
    """Write OUT/report.json, whole or not at all."""
    write_whole(out / "report.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")


def show_report(report: Mapping[str, Any], console: Console) -> None:
    """Print the report's main tables."""
    _show(console, "records", ("by", "", "records"), _records_rows(report))
    _show(console, "not used", ("model", "reason", "replies"), _nested(report["rejected"]))
    _show(console, "left out", ("reason", "records"), report["left_out"].items())
    _show(console, "spent", ("model", "requests", "tokens read", "written", "money"), _spent_rows(report))
    for kind, found in report["sample"].items():
        rows = [(key, *table.values()) for key, table in found["words"].items()]
        distinct = ", ".join(f"{value:.2f}" for value in found["distinct_n"])
        title = f"words of {kind} texts ({found['records']:,} records; distinct-1, -2, -3: {distinct})"
        _show(console, title, ("text", *_buckets()), rows)


def _records_rows(report: Mapping[str, Any]) -> Iterator[tuple[Any, ...]]:
    for by, table in report["records"].items():
        rest = sum(list(table.values())[12:])
        yield from ((by.removeprefix("by_"), name, n) for name, n in islice(table.items(), 12))
        if rest:
            yield by.removeprefix("by_"), f"{len(table) - 12} others", rest
    yield from (("tasks", kind, n) for kind, n in report["tasks"].items())


def _spent_rows(report: Mapping[str, Any]) -> Iterator[tuple[Any, ...]]:
    for model, spent in report["spent"].items():
        yield model, spent["requests"], spent["input_tokens"], spent["output_tokens"], f"{spent['money']:.4f}"


def _nested(table: Mapping[str, Mapping[str, int]]) -> Iterator[tuple[Any, ...]]:
    return ((outer, inner, n) for outer, counts in table.items() for inner, n in counts.items())


def _show(console: Console, title: str, columns: tuple[str, ...], rows: Any) -> None:
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*(f"{cell:,}" if isinstance(cell, int) else cell for cell in row))
    if table.rows:
        console.print(table)


def _amounts(spent: Spent) -> dict[str, float]:
    return {**spent._asdict(), "money": spent.money / TRILLION}


def _texts_report(sample: list[dict[str, Any]], languages: Languages) -> dict[str, Any]:
    """Return, by kind: number of records, distinct-n for n = 1, 2, 3, and a histogram of the words of every text."""
    report: dict[str, Any] = {}
    for kind in sorted({fields["kind"] for fields in sample}):
        words: dict[str, Counter[str]] = defaultdict(Counter)
        seen: list[set[tuple[str, ...]]] = [set(), set(), set()]
        totals = [0, 0, 0]
        chosen = [fields for fields in sample if fields["kind"] == kind]
        for fields in chosen:
            spoken = spoken_in(fields["language"], tuple(fields["response"]))
            for key, text in fields["response"].items():
                words[key][_bucket(count_words(text, languages.known.get(spoken[key])))] += 1
                tokens = text.casefold().split()
                for n in (1, 2, 3):
                    runs = list(zip(*(tokens[i:] for i in range(n)), strict=False))
                    seen[n - 1].update(runs)
                    totals[n - 1] += len(runs)
        distinct = [round(len(runs) / max(total, 1), 4) for runs, total in zip(seen, totals, strict=True)]
        histogram = {key: {bucket: counts[bucket] for bucket in _buckets()} for key, counts in words.items()}
        report[kind] = {"records": len(chosen), "distinct_n": distinct, "words": histogram}
    return report


def _buckets() -> tuple[str, ...]:
    inner = (f"{low}-{high - 1}" for low, high in zip(BORDERS, BORDERS[1:], strict=False))
    return (f"< {BORDERS[0]}", *inner, f">= {BORDERS[-1]}")


def _bucket(n_words: float) -> str:
    return _buckets()[sum(n_words >= border for border in BORDERS)]
