"""Score a model: `python -m e5core.evaluate MODEL --retrieval DIR... --sts FILE... --out R.json`.

Local files are scored as scores.py says, on as many ranks as torchrun starts. With --mteb the package mteb loads and
scores its own tasks (mteb_model.py).
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import get_args

from e5core.checkpoint import write_json
from e5core.distributed import finish, log, log_error, start
from e5core.mteb_model import TaskFailure, find_tasks, identify, results_folder, run_tasks
from e5core.mteb_tasks import read_table
from e5core.passkey import MOST_DOCUMENTS, N_DOCUMENTS, N_QUERIES, Passkeys, draw_passkeys, score_passkeys
from e5core.records import nearest
from e5core.rope_scaling import add_options, chosen_context
from e5core.scores import score_set, show_table
from e5core.sharding import Strategy
from e5core.template import check_task
from e5core.testsets import METRICS, EvalSet, read_sets
from e5core.text_encoder import Encoder, ShownEncoder, describe_device


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit status: 0, or 2 after an error, which is one line on stderr."""
    arguments = _parser().parse_args(argv)
    try:
        _run(arguments)
    except (ValueError, OSError, FloatingPointError, TaskFailure) as error:
        log_error(f"e5core.evaluate: {' '.join(str(error).splitlines())}")
        return 2
    finish()
    return 0


def _run(arguments: argparse.Namespace) -> None:
    out: Path | None = arguments.out
    if out is not None and not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"no such folder for --out: {out.absolute().parent}")
    named, given = _named_sets(arguments)
    sets = read_sets(named) if named or not (arguments.mteb or arguments.passkey) else []
    folder = results_folder(arguments.model, arguments.mteb_folder) if arguments.mteb else Path()
    world = start()
    tasks = find_tasks(arguments.mteb, given) if arguments.mteb and world.is_main else {}
    chosen = {name: vars(arguments)[name] for name in ("max_tokens", "dtype", "base", "dimensions", "strategy")}
    context = chosen_context(arguments)
    encoder = Encoder.load(arguments.model, world=world, context=context, **chosen)
    for _, sign, task in (given.partition("=") for given in arguments.task):
        check_task(task if sign else None, encoder.template)
    log(describe_device(encoder.device))
    drawn = [(n_tokens, *_passkeys(encoder, n_tokens, arguments)) for n_tokens in arguments.passkey]
    scores: dict[str, float] = {}
    for eval_set, texts in ((eval_set.under(encoder.template), texts) for eval_set, texts in sets):
        log(f"evaluating {eval_set.name}")
        scores |= score_set(ShownEncoder(encoder), eval_set, texts)
    for n_tokens, reader, passkeys in drawn:
        log(f"evaluating passkey-{n_tokens}")
        share_found = score_passkeys(ShownEncoder(reader), passkeys, encoder.template)
        scores[f"passkey-{n_tokens}/accuracy"] = 100.0 * share_found
    failures: dict[str, str] = {}
    if arguments.mteb:
        settings = {name: vars(arguments)[name] for name in ("max_tokens", "dtype", "dimensions")} | asdict(context)
        identity = identify(arguments.model, encoder.dim, encoder.max_tokens, settings)
        asked = (tasks, ShownEncoder(encoder).encode, world, identity, folder, given, encoder.template)
        more, failures = run_tasks(*asked)
        scores |= more
    log(f"{encoder.n_truncated:,} texts were cut to {encoder.max_tokens} tokens")
    if world.is_main:
        show_table({"score": scores})
        if out is not None:
            write_json(out, scores)
    if failures:
        raise TaskFailure(f"no score for {', '.join(failures)} (why: above); the same line again runs these alone")


def _passkeys(encoder: Encoder, n_tokens: int, arguments: argparse.Namespace) -> tuple[Encoder, Passkeys]:
    """Draw the texts of one length, and take the encoder that reads them: whole, unless --max-tokens says otherwise."""
    whole = max(n_tokens, encoder.max_tokens)
    reader = encoder if arguments.max_tokens is not None else encoder.at_length(whole)
    counts = (arguments.passkey_documents, arguments.max_queries or N_QUERIES)
    return reader, draw_passkeys(encoder.tokenizer, n_tokens, *counts)


def _named_sets(arguments: argparse.Namespace) -> tuple[list[EvalSet], dict[str, str]]:
    """The sets of the command line with their --task, which must name one of them; what it has for MTEB's tasks."""
    tasks: dict[str, str] = {}
    for given in arguments.task:
        name, sign, task = given.partition("=")
        if not sign:
            raise ValueError(f"--task must be NAME=TEXT, got {given!r}")
        tasks[name] = task
    sets: list[EvalSet] = []
    for kind in METRICS:
        for path in vars(arguments)[kind]:
            # "" stands in until the name is known: without a task an unknown classification is refused.
            name = EvalSet(kind=kind, path=path, task="").name
            max_queries = arguments.max_queries if kind == "retrieval" else None
            sets.append(EvalSet(kind=kind, path=path, task=tasks.get(name), max_queries=max_queries))
    names = [eval_set.name for eval_set in sets]
    others = {name: task for name, task in tasks.items() if name not in names}
    if others and not arguments.mteb:
        name = next(iter(others))
        raise ValueError(f"--task names the unknown set {name!r}; {nearest(name, names)}")
    return sets, others


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {number}")
    return number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m e5core.evaluate", description="Score an embedder on test sets.")
    parser.add_argument("model", metavar="MODEL", help="run folder, adapter, Hugging Face folder or .gguf file")
    parser.add_argument("--base", metavar="PATH", help="base model of an adapter (default: where the adapter says)")
    _add_sets(parser)
    parser.add_argument(
        "--mteb", metavar="NAME", nargs="+", action="extend", default=[],
        help=f"MTEB's tasks and benchmarks by name, or {', '.join(read_table().groups)}; downloads, needs mteb"
    )  # fmt: skip
    parser.add_argument(
        "--mteb-folder", metavar="DIR", type=Path, help="MTEB's results; what is there is not run again (MODEL/mteb)"
    )
    parser.add_argument(
        "--task", metavar="NAME=TEXT", nargs="+", action="extend", default=[], help="a set's or task's instruction"
    )
    parser.add_argument(
        "--max-queries", metavar="N", type=_positive, help=f"N queries of each retrieval set, passkey too ({N_QUERIES})"
    )
    parser.add_argument(
        "--max-tokens", metavar="N", type=_positive, help="longest text in tokens (default: the model's)"
    )
    parser.add_argument("--dimensions", metavar="D", type=_positive, help="score the first D numbers of each vector")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of weights (auto)")
    add_options(parser)
    parser.add_argument("--strategy", choices=get_args(Strategy), default="auto", help="how ranks hold the model")
    parser.add_argument("--out", metavar="R.json", type=Path, help="write the scores to this file")
    return parser


def _add_sets(parser: argparse.ArgumentParser) -> None:
    for kind, metavar, text in (
        ("retrieval", "DIR", "BEIR folders: corpus.jsonl, queries.jsonl, qrels/test.tsv"),
        ("sts", "FILE", ".jsonl files of sentence1, sentence2, score"),
        ("bitext", "FILE", ".jsonl files of sentence1 (foreign), sentence2 (English)"),
        ("classification", "DIR", "folders with train.jsonl and test.jsonl of text, label"),
        ("clustering", "DIR", "folders with test.jsonl of text, label"),
        ("pair-classification", "DIR", "folders with test.jsonl of sentence1, sentence2, label (1 or 0)"),
        ("reranking", "DIR", "folders with test.jsonl of query, positive (list), negative (list)"),
    ):
        parser.add_argument(f"--{kind}", dest=kind, metavar=metavar, nargs="+", action="extend", default=[], help=text)
    parser.add_argument(
        "--passkey", metavar="LENGTH", nargs="+", type=_positive, action="extend", default=[],
        help="find a person's pass key in made texts of so many tokens (passkey.py)"
    )  # fmt: skip
    parser.add_argument(
        "--passkey-documents", metavar="N", type=_positive, default=N_DOCUMENTS,
        help=f"texts of each length, to {MOST_DOCUMENTS} (the paper's {N_DOCUMENTS})"
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
