"""What a run leaves for others: OUT/records.jsonl, and of a grounded run OUT/held_out and OUT/train.toml.

records.jsonl holds the surviving records by rising key, so its bytes do not depend on the order of answers. Left out
of it, and counted by reason: records with a text of an evaluation set (arXiv 2401.00368, appendix B), that fail the
round trip, of held-out passages, and near-duplicates.
"""

import copy
from collections import Counter
from pathlib import Path

import tomli_w

from e5core.config import write_whole
from e5core.synth.corpus import is_held_out, write_held_out
from e5core.synth.generate import Run
from e5core.synth.round_trip import failing
from e5core.synth.settings import SynthConfig


def write_outputs(run: Run) -> tuple[int, Counter[str]]:
    """Write records.jsonl and the held-out set, each whole or not at all.

    Returns how many records are in records.jsonl, and how many were left out by reason.
    Raises RuntimeError where the round trip's model fails, ValueError where no record is of a held-out passage.
    """
    checks, corpus = run.config.checks, run.config.corpus
    share = 0.0 if corpus is None else corpus.held_out
    trip = checks.round_trip
    lost = set() if trip is None else failing(run.store.records(), trip.model, trip.top, run.out)

    def fault(fields: dict[str, object]) -> str:
        if run.contaminated(fields):  # accepted before the evaluation sets were named
            return "contaminated"
        return "round_trip" if fields["id"] in lost else ""

    def why_not(fields: dict[str, object]) -> str:
        passage = _passage(fields)
        return fault(fields) or ("held_out" if passage and is_held_out(passage, share) else "")

    if share:
        rows = (fields for fields in run.store.records() if not fault(fields))
        write_held_out(run.out / "held_out", run.plan.corpus, rows, share)
    return run.store.write_records(run.out / "records.jsonl", drop=why_not, near_duplicates=checks.near_duplicates)


def write_training(config: SynthConfig) -> Path | None:
    """Write OUT/train.toml, which e5core.train takes: the [training] table, its gaps filled with this run's files.

    Returns its path; None where there is no [training] table.
    """
    if not config.training:
        return None
    out, training = Path(config.synth.out), copy.deepcopy(config.training)
    training.setdefault("train", {}).setdefault("run", str(out / "run"))
    training.setdefault("data", {}).setdefault("sources", [{"path": str(out / "records.jsonl")}])
    if config.corpus is not None and config.corpus.held_out:
        training.setdefault("eval", {}).setdefault("report", [{"kind": "retrieval", "path": str(out / "held_out")}])
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "train.toml", tomli_w.dumps(training))
    return out / "train.toml"


def _passage(fields: dict[str, object]) -> str:
    params = fields["params"]
    return str(params.get("passage", "")) if isinstance(params, dict) else ""
