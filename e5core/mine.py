"""Hard negatives: `python -m e5core.mine MODEL --corpus C.jsonl --queries Q.jsonl --out MINED.jsonl`.

C.jsonl holds the documents ({"text"}, with or without "title"), Q.jsonl training records (records.py), whose positives
join the corpus where it lacks them. The nearest documents of each record are found exactly, filtered (negatives.py),
and the first ones, or a random choice, become its `neg`, nearest first, in place of what it had; `scores` are those of
its positives and of each negative, as loss.distillation takes them. MINED.jsonl is ready for data.sources;
MINED.report.json and the log say what each filter removed.

Vectors of any model come by --corpus-vectors and --query-vectors (.npy, a row per line), mapped, not loaded; what they
lack, MODEL embeds in memory. Records pass through block by block; the texts of the corpus stay in memory.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields
from itertools import islice
from pathlib import Path

import numpy as np

from e5core.approximate import check_faiss
from e5core.config import write_whole
from e5core.contamination import evaluation_hashes, occur, text_hashes
from e5core.distributed import finish, log, log_error, start
from e5core.negatives import Corpus, MineConfig, Miner, Positives
from e5core.progress import Display
from e5core.records import Record, parse_lines, read_lines, read_texts
from e5core.search import BLOCK_QUERIES
from e5core.template import training_task
from e5core.text_encoder import Encoder, ShownEncoder, describe_device

PLAIN_EVERY_S = 10.0
Embed = Callable[[Sequence[Record], int], np.ndarray]  # records and the place of the first -> (n, D)


def read_blocks(path: Path, size: int) -> Iterator[list[Record]]:
    """Yield a file's records, `size` at a time.  Raises BrokenRecord naming file and line."""
    lines = read_lines(path)
    while block := parse_lines(islice(lines, size), path, skip_broken=False)[0]:
        yield block


def read_corpus(path: Path, queries: Path, banned: np.ndarray) -> tuple[Corpus, Positives, int]:
    """Read the documents, and check all records.

    Returns the corpus with the positives that it lacked behind its own texts, the positives, and how many records.
    """
    texts = list(read_texts(path))
    if not texts:
        raise ValueError(f"{path}: no document in it")
    known = np.unique(text_hashes(texts))
    pairs: list[np.ndarray] = []
    missing: dict[int, str] = {}
    n_records = 0
    for block in read_blocks(queries, BLOCK_QUERIES):
        n_records += len(block)
        hashes = text_hashes(text for record in block for text in record.positives)
        owners = text_hashes(record.query for record in block)
        pairs.append(np.stack([np.repeat(owners, [len(record.positives) for record in block]), hashes]))
        block_texts = [text for record in block for text in record.positives]
        missing |= {int(hashes[i]): block_texts[i] for i in np.flatnonzero(~occur(hashes, known))}
    if not n_records:
        raise ValueError(f"{queries}: no record in it")
    both = np.concatenate(pairs, axis=1)
    return Corpus(texts, list(missing.values()), banned), Positives(both[0], both[1]), n_records


def mine_file(queries: Path, out: Path, miner: Miner, embed: Embed, n_records: int) -> None:
    """Mine for every record of a file, block by block, and write OUT and its report, whole or not at all."""
    partial = out.with_name(f".partial_{out.name}")
    try:
        with open(partial, "w", encoding="utf-8") as file, Display("record", n_records, log) as progress:
            started_s = plain_s = time.monotonic()
            for block in read_blocks(queries, BLOCK_QUERIES):
                done = miner.report.n_records
                for mined in miner.mine(block, embed(block, done), done):
                    file.write(json.dumps(mined, ensure_ascii=False) + "\n")
                done, now_s = miner.report.n_records, time.monotonic()
                due = now_s - plain_s >= PLAIN_EVERY_S or done == n_records
                plain_s = now_s if due else plain_s
                rate = done / (now_s - started_s)
                progress.show(done, f"records_per_s {rate:,.0f}", (n_records - done) / rate, due)
            file.flush()
            os.fsync(file.fileno())
        write_whole(out.with_suffix(".report.json"), json.dumps(asdict(miner.report), indent=2) + "\n")
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)


def embed_queries(encoder: Encoder, records: Sequence[Record]) -> np.ndarray:
    """Embed the queries of records, each with its task as in training.  Returns (n, D) float32."""
    by_task: dict[str, list[int]] = {}
    for i, record in enumerate(records):
        by_task.setdefault(training_task(record, encoder.template), []).append(i)
    order = np.concatenate([np.array(places) for places in by_task.values()])
    parts = [encoder.encode([records[i].query for i in places], task or None) for task, places in by_task.items()]
    return np.concatenate(parts)[np.argsort(order)]


def read_vectors(path: Path, n_rows: int, what: str) -> np.ndarray:
    """Map a .npy file of (n_rows, D) vectors.  Raises ValueError where it holds something else."""
    vectors = np.load(path, mmap_mode="r", allow_pickle=False)
    if vectors.ndim != 2 or vectors.dtype.kind != "f" or len(vectors) != n_rows:
        raise ValueError(
            f"{path}: must hold a row of floats for each of {n_rows:,} {what}: got {vectors.dtype} of shape "
            f"{vectors.shape}"
        )
    return vectors


def _run(arguments: argparse.Namespace) -> None:
    config = MineConfig(**{option.name: vars(arguments)[option.name] for option in fields(MineConfig)})
    if not arguments.out.absolute().parent.is_dir():
        raise FileNotFoundError(f"no such folder for --out: {arguments.out.absolute().parent}")
    world = start()
    if world.world_size > 1:
        raise ValueError(
            f"mining is the work of one process: got {world.world_size}; embed on many by torchrun -m e5core.encode, "
            "then give --corpus-vectors and --query-vectors"
        )
    if arguments.approximate:
        check_faiss()
    parts = [evaluation_hashes(folder) for folder in arguments.against]
    banned = np.unique(np.concatenate(parts)) if parts else np.empty(0, dtype=np.uint64)
    corpus, positives, n_records = read_corpus(arguments.corpus, arguments.queries, banned)
    query_vectors, vectors, encoder = None, None, None
    if arguments.query_vectors is not None:
        query_vectors = read_vectors(arguments.query_vectors, n_records, "records")
    if arguments.corpus_vectors is not None:
        if corpus.n_added:
            raise ValueError(
                f"{corpus.n_added:,} positives are not in the corpus, so they have no vector; add them to both; the "
                f"first is {corpus.texts[-corpus.n_added][:80]!r}"
            )
        vectors = read_vectors(arguments.corpus_vectors, len(corpus.texts), "documents")
    if query_vectors is None or vectors is None:
        encoder = Encoder.load(arguments.model, max_tokens=arguments.max_tokens, dtype=arguments.dtype)
        log(describe_device(encoder.device))
    if vectors is None:
        vectors = ShownEncoder(encoder).encode(corpus.texts)
    miner = Miner(corpus, vectors, positives, config, world.device, approximate=arguments.approximate)

    def embed(records: Sequence[Record], first: int) -> np.ndarray:
        return embed_queries(encoder, records) if query_vectors is None else query_vectors[first : first + len(records)]

    mine_file(arguments.queries, arguments.out, miner, embed, n_records)
    for line in miner.report.lines():
        log(line)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.  Returns the exit status: 0, or 2 for bad input."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.model is None and (arguments.corpus_vectors is None or arguments.query_vectors is None):
        parser.error("MODEL is needed, or --corpus-vectors and --query-vectors")
    try:
        _run(arguments)
    except (ValueError, OSError, FloatingPointError) as error:
        log_error(f"e5core.mine: {error}")
        return 2
    finish()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m e5core.mine", description="Find hard negatives for records.")
    parser.add_argument("model", nargs="?", metavar="MODEL", help="run folder, Hugging Face folder or .gguf file")
    parser.add_argument("--corpus", type=Path, required=True, metavar="C.jsonl", help='documents: lines with a "text"')
    parser.add_argument("--queries", type=Path, required=True, metavar="Q.jsonl", help="training records, any layout")
    parser.add_argument("--out", type=Path, required=True, metavar="MINED.jsonl", help="records with negatives")
    parser.add_argument("--corpus-vectors", type=Path, metavar="C.npy", help="vectors of the corpus, by any model")
    parser.add_argument("--query-vectors", type=Path, metavar="Q.npy", help="vectors of the queries, by the same")
    parser.add_argument("--n", dest="n_negatives", type=int, metavar="N", default=7, help="negatives per record (7)")
    parser.add_argument("--depth", type=int, metavar="N", default=100, help="nearest documents to look at (100)")
    parser.add_argument("--skip", type=int, metavar="N", default=0, help="pass over the N nearest that filters leave")
    parser.add_argument("--margin", type=float, metavar="X", help="keep scores up to the positive's - X")
    parser.add_argument("--relative-margin", type=float, metavar="X", help="the same, X of the positive's (0.05: 5%%)")
    parser.add_argument("--max-score", type=float, metavar="X", help="keep scores up to X")
    parser.add_argument("--min-score", type=float, metavar="X", help="keep scores from X")
    parser.add_argument("--choice", choices=("top", "random"), default="top", help="of what is left (top)")
    parser.add_argument("--seed", type=int, metavar="N", default=0, help="of the random choice (0)")
    parser.add_argument(
        "--against", type=Path, metavar="DIR", nargs="+", default=[], help="leave out texts of these evaluation sets"
    )
    parser.add_argument("--approximate", action="store_true", help="search by faiss: faster on a CPU, misses some")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="cut texts to this many tokens (MODEL's)")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of MODEL (auto)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
