"""Which backbone for many languages?  `python -m bench.multilingual --data DIR --work DIR --models NAME=PATH ...`.

Each model is trained by configs/gemma3_270m.toml on the same records in the same order, and scored before and after
on Tatoeba (30 languages, the first pairs of each) and XQuAD in four languages, cut small enough for a CPU. A score that
has a line in WORK/results.jsonl is not made again.
"""

import argparse
import json
from pathlib import Path
from statistics import fmean

import torch

from bench.mixtures import cut_retrieval, read_rows, run_module, write_rows
from bench.roofline import record

CONFIG = Path("configs/gemma3_270m.toml")
XQUAD = ("xquad-en", "xquad-de", "xquad-ar", "xquad-zh")
N_QUERIES, N_DOCUMENTS, N_PAIRS = 40, 60, 50
MAX_TOKENS = 128


def main() -> None:
    """Train and score the models that have no result yet."""
    arguments = _parser().parse_args()
    work: Path = arguments.work
    if not (work / "dev").is_dir():
        cut_sets(arguments.data, work / "dev.new")
        (work / "dev.new").rename(work / "dev")
    for name, path in arguments.models:
        run = work / "runs" / name
        score(name, "before", path, work)
        if not list(run.glob("step_*")):
            train(path, run)
        score(name, "after", str(run), work)


def cut_sets(data: Path, out: Path) -> None:
    """Cut Tatoeba and XQuAD small."""
    for name in XQUAD:
        cut_retrieval(data / "retrieval" / name, out / name, N_QUERIES, N_DOCUMENTS)
    for file in sorted((data / "bitext" / "tatoeba").glob("*.jsonl")):
        write_rows(out / "tatoeba" / file.name, read_rows(file)[:N_PAIRS])


def train(path: str, run: Path) -> None:
    """Train a backbone by CONFIG, without its report."""
    text = CONFIG.read_text(encoding="utf-8").partition("[[eval.report]]")[0]
    config = run.with_suffix(".toml")
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(text, encoding="utf-8")
    run_module("e5core.train", str(config), f"train.run={run}", f"backbone.path={path}", "train.overwrite=true")


def score(name: str, when: str, model: str, work: Path) -> None:
    """Score a model and record it, with Tatoeba's mean; nothing where its line is there."""
    results, out = work / "results.jsonl", work / f"{name}-{when}.json"
    lines = results.read_text(encoding="utf-8").splitlines() if results.is_file() else []
    if any((line["model"], line["when"]) == (name, when) for line in map(json.loads, lines)):
        return
    pairs = sorted(map(str, (work / "dev" / "tatoeba").glob("*.jsonl")))
    folders = [str(work / "dev" / folder) for folder in XQUAD]
    sets = ("--retrieval", *folders, "--bitext", *pairs)
    run_module("e5core.evaluate", model, *sets, "--max-tokens", str(MAX_TOKENS), "--out", str(out))
    scores = json.loads(out.read_text(encoding="utf-8"))
    tatoeba = fmean(scores[f"{Path(file).stem}/accuracy"] for file in pairs)
    row = {
        "bench": "multilingual",
        "model": name,
        "when": when,
        "tatoeba_accuracy": round(tatoeba, 2),
        "scores": scores,
    }
    record(row, torch.device("cpu"), results)


def _model(text: str) -> tuple[str, str]:
    name, sign, path = text.partition("=")
    if not sign:
        raise argparse.ArgumentTypeError(f"must be NAME=PATH, got {text!r}")
    return name, path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.multilingual", description="Compare multilingual backbones.")
    parser.add_argument("--data", metavar="DIR", type=Path, required=True, help="with retrieval/ and bitext/tatoeba/")
    parser.add_argument("--work", metavar="DIR", type=Path, required=True, help="runs, cut sets and results.jsonl")
    parser.add_argument("--models", metavar="NAME=PATH", nargs="+", type=_model, required=True, help="backbones")
    return parser


if __name__ == "__main__":
    main()
