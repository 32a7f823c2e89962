"""Look at a config's training data, or build its stores: `python -m e5core.data check|build CONFIG.toml`.

check   says of each source what is there and what is missing, how many rows it has and gives to an epoch, how long its
        texts are, and shows three examples as the model will see them: text and ids. Then it says which texts occur
        in the config's evaluation sets, of those that they are scored on, and in any file below --against's folders.
build   joins and decompresses each source once into a store below data.store, which training then reads instead: any
        number of rows in constant memory. A store that still is its source's is left as it is.
"""

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from e5core.batches import build_batch
from e5core.config import load_config
from e5core.contamination import find_overlap
from e5core.distributed import log, log_error
from e5core.mixture import stored_rows
from e5core.records import Record
from e5core.row_store import StoredRows, build_store, stale, store_folder
from e5core.run import Config
from e5core.sources import Notes, Source, format_of, is_growing, read_source
from e5core.template import Template, document_text, query_text, training_task
from e5core.tokenizer import Tokenizer
from e5core.weights import resolve_model

SAMPLE = 1000  # rows of a source whose texts are measured
N_EXAMPLES = 3
SHOWN_CHARACTERS = 100  # of a text that an evaluation set has too
LINE_EVERY_S = 15.0
EDGES = (16, 32, 64, 128, 256, 512, 1024)  # of the histogram, in tokens

Show = Callable[[Iterator[Record]], Iterator[Record]]


def check(config: Config, against: Sequence[Path] = ()) -> int:
    """Say what is there of a config's training data, and what of it is in evaluation sets: the config's, and `against`.

    Returns the number of sources and evaluation sets that are missing or broken.
    """
    tokenizer = _tokenizer(config)
    lengths: list[int] = []
    usable: list[Source] = []
    n_bad = 0
    for i, source in enumerate(config.data.sources):
        log(f"\n== data.sources[{i}] {source.path}{f' ({source.url})' if source.url else ''}")
        try:
            lengths.append(_check_source(config, source, tokenizer))
            usable.append(source)
        except (OSError, ValueError) as error:
            log(f"   {'missing' if isinstance(error, FileNotFoundError) else 'broken'}: {error}")
            lengths.append(0)
            n_bad += 1
    _log_epoch(config, lengths)
    log(f"{len(lengths) - n_bad} of {len(lengths)} sources are there{'' if n_bad else '; nothing is missing'}")
    evaluated = [item.tested for item in (*config.eval.sets, *config.eval.report)]
    return n_bad + _check_overlap(config, usable, evaluated, against)


def _check_overlap(config: Config, sources: Sequence[Source], own: Sequence[Path], against: Sequence[Path]) -> int:
    """Say which texts of the sources occur in evaluation sets.  Returns the number of sets that are missing."""
    sets = list(dict.fromkeys([*own, *against]))
    missing = [path for path in sets if not path.exists()]
    for path in missing:
        log(f"missing evaluation set: {path}")
    there = [path for path in sets if path not in missing]
    if not there or not sources:
        log("no texts compared with evaluation sets: there must be a source, and a set in [eval] or by --against")
        return len(missing)
    log("\ntexts of the training data in evaluation sets (labels and ids of a set count too: look at the examples)")
    if any(path.is_dir() for path in against):
        log("   below --against's folders every file counts, a train split's too; name a file to compare with it alone")
    for name, overlap in find_overlap(_records(config, sources), there, n_examples=N_EXAMPLES).items():
        sides = ", ".join(f"{n:,} {side}" for side, n in overlap.n_texts.items())
        log(f"   {name}: {overlap.n_records:,} records ({sides})")
        for found in overlap.examples:
            log(f"      {found.record}, {found.side}: {found.text[:SHOWN_CHARACTERS]!r}")
    return len(missing)


def _records(config: Config, sources: Sequence[Source]) -> Iterator[Record]:
    """Yield the sources' records, each once, without those that are broken."""
    for source in sources:
        with tempfile.TemporaryDirectory() as spool:
            rows = stored_rows(config.data, source)
            if rows is None:
                rows = read_source(source, Path(spool), Notes(skip_broken=True))
            yield from _shown(source.path)(iter(rows))


def _check_source(config: Config, source: Source, tokenizer: Tokenizer | None) -> int:
    """Read a source and show it.  Returns its number of rows."""
    rows, notes = stored_rows(config.data, source), Notes(skip_broken=True)
    if rows is not None:
        drawn = random.Random(0).sample(range(len(rows)), min(SAMPLE, len(rows)))
        n_rows, sample = len(rows), [(row, rows[row]) for row in sorted(drawn)]
    else:
        with tempfile.TemporaryDirectory() as spool:
            n_rows, sample = _sampled(_shown(source.path)(read_source(source, Path(spool), notes)))
        log(f"   format {format_of(source)}, {n_rows:,} rows; {notes.n_without_positive:,} without a positive left out")
    for message in notes.skipped[:3]:
        log(f"   broken row: {message}")
    dressed = [source.dress(record, row) for row, record in sample]
    _log_lengths(dressed, tokenizer, config.batch.max_tokens, config.batch.template)
    for record in dressed[:N_EXAMPLES]:
        _log_example(record, tokenizer, config)
    if notes.skipped and not config.data.skip_broken:
        raise ValueError(f"{len(notes.skipped):,} broken rows; mend them, or leave them out: data.skip_broken = true")
    return n_rows


def _sampled(records: Iterator[Record]) -> tuple[int, list[tuple[int, Record]]]:
    """Count records, and keep a random sample of them with their numbers (reservoir sampling), the first ones first."""
    generator, kept, n_rows = random.Random(0), [], 0
    for n_rows, record in enumerate(records, start=1):
        if len(kept) < SAMPLE:
            kept.append((n_rows - 1, record))
        elif (place := generator.randrange(n_rows)) < SAMPLE:
            kept[place] = (n_rows - 1, record)
    return n_rows, sorted(kept, key=lambda pair: pair[0])


def _log_lengths(records: Sequence[Record], tokenizer: Tokenizer | None, max_tokens: int, template: Template) -> None:
    """Show how long the texts of each side are, in tokens with the template, cut or not."""
    sides = {
        "queries": [query_text(training_task(record, template), record.query, template) for record in records],
        "positives": [document_text(text) for record in records for text in record.positives],
        "negatives": [document_text(text) for record in records for text in record.negatives],
    }
    edges = [edge for edge in EDGES if edge < max_tokens] + [max_tokens]
    for side, texts in sides.items():
        if not texts:
            log(f"   {side}: none")
            continue
        if tokenizer is None:
            log(f"   {side}: {sum(map(len, texts)) / len(texts):.0f} characters on average")
            continue
        counts = sorted(map(len, tokenizer.encode_batch(texts, 2**31)[0]))
        bins = [sum(low < n <= high for n in counts) for low, high in zip((0, *edges), edges, strict=False)]
        cut = sum(n > max_tokens for n in counts)
        shown = ", ".join(f"<={edge} {100 * n / len(counts):.0f}%" for edge, n in zip(edges, bins, strict=True))
        median, longest = counts[len(counts) // 2], counts[-1]
        log(f"   {side}: {shown}; cut {100 * cut / len(counts):.1f}%; median {median}, longest {longest} tokens")


def _log_example(record: Record, tokenizer: Tokenizer | None, config: Config) -> None:
    """Show one example as it enters the model, or its texts where there is no tokenizer."""
    log(f"   -- {record.id}{'' if record.in_batch else ' (in-batch negatives off)'}")
    if tokenizer is None:
        template = config.batch.template
        query = query_text(training_task(record, template), record.query, template)
        log(f"   query: {query!r}\n   positive: {record.positives[0]!r}")
        return
    batch = build_batch([record], tokenizer, config.batch, config.train.seed, 0)
    sides = ("query", "positive", *["negative"] * len(batch.sequences))
    for side, ids in zip(sides, batch.sequences, strict=False):
        log(f"   {side}, {len(ids)} tokens: {tokenizer.decode(ids)!r}\n      {ids}")


def _log_epoch(config: Config, lengths: Sequence[int]) -> None:
    """Show what each source gives to an epoch."""
    weights = [source.weight for source in config.data.sources if source.weight is not None]
    if weights:
        drawn = [sum(lengths) * weight / sum(weights) for weight in weights]
    else:
        drawn = [n * source.ratio for n, source in zip(lengths, config.data.sources, strict=True)]
    total = sum(map(round, drawn))
    log("\nan epoch draws")
    for source, n, part in zip(config.data.sources, lengths, drawn, strict=True):
        log(f"   {round(part):>12,} of {n:>12,} rows, {100 * part / max(total, 1):5.1f}%  {source.path}")
    log(f"   {total:>12,} examples: {total / config.batch.size:,.1f} steps of {config.batch.size:,}")


def build(config: Config) -> None:
    """Build the stores of a config's sources that are not there or are stale.

    Raises ValueError where the config names no folder for them; BrokenRecord, OSError or ValueError of a source.
    """
    if not config.data.store:
        raise ValueError('data.store names no folder: set it in the config, or here: data.store="stores"')
    for source in config.data.sources:
        folder = store_folder(Path(config.data.store), source)
        if folder.is_dir() and not (why := _unfit(folder, source, config.data.skip_broken)):
            log(f"{source.path}: {folder} is up to date")
            continue
        if folder.is_dir():
            log(f"{source.path}: {folder} is built again: {why}")
        if Path(source.path).is_dir() and is_growing(source):
            log(f"{source.path}: a folder that may grow is read as it is, not stored")
            continue
        started = time.monotonic()
        skip_broken = config.data.skip_broken
        notes = build_store(folder, source, skip_broken=skip_broken, show=_shown(source.path))
        for message in notes.skipped:
            log(f"skipped {message}")
        rows, seconds = StoredRows(folder), time.monotonic() - started
        log(
            f"{source.path}: {len(rows):,} rows of the format {format_of(source)} in {folder}, {seconds:.1f} s; "
            f"{notes.n_without_positive:,} rows without a positive left out"
        )


def _unfit(folder: Path, source: Source, skip_broken: bool) -> str:
    try:
        return stale(StoredRows(folder), source, skip_broken=skip_broken)
    except (ValueError, OSError) as error:
        return str(error)


def _shown(name: str) -> Show:
    """Return what passes records on and says every 15 s how many there were; how many will come nobody knows."""

    def pass_on(records: Iterator[Record]) -> Iterator[Record]:
        started = last = time.monotonic()
        for n_rows, record in enumerate(records, start=1):
            yield record
            if n_rows % 1000 == 0 and time.monotonic() - last > LINE_EVERY_S:
                last = time.monotonic()
                log(f"{name}: {n_rows:,} rows, {n_rows / (last - started):,.0f} a second")

    return pass_on


def _tokenizer(config: Config) -> Tokenizer | None:
    try:
        return Tokenizer.load(resolve_model(config.backbone.path), config.tokenizer)
    except FileNotFoundError as error:
        log(f"backbone.path: {error}\nno tokenizer, so texts are shown without ids and measured in characters")
        return None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.  Returns the exit status: 0; 1 where check misses something; 2 with one line on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m e5core.data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("check", "build"))
    parser.add_argument("config", type=Path, help="TOML file of a training run, e.g. configs/e5_mistral_full.toml")
    parser.add_argument("overrides", nargs="*", help="section.key=value, e.g. data.store=stores")
    parser.add_argument(
        "--against", type=Path, metavar="FOLDER", action="append", default=[], help="more evaluation sets, for check"
    )
    arguments = parser.parse_intermixed_args(argv)
    try:
        config = load_config(Config, arguments.config, arguments.overrides)
        if arguments.command == "check":
            return min(check(config, arguments.against), 1)
        build(config)
    except (ValueError, OSError) as error:
        log_error(f"e5core.data: {error}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
