"""Write training records with an LLM: `python -m e5core.synth CONFIG.toml [section.key=value ...]`.

Every table and key stands with its meaning in configs/synth.toml. A run that ends, however it does, goes on where it
stopped when it is started again; a finished one only writes its outputs anew. API keys are read from the environment
variables that the config names.
"""

import argparse
import asyncio
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from e5core.config import load_config, write_config
from e5core.contamination import evaluation_hashes
from e5core.progress import Display
from e5core.synth.generate import Outcome, Run
from e5core.synth.ledger import TRILLION, BudgetSpent
from e5core.synth.outputs import write_outputs, write_training
from e5core.synth.preview import show_preview
from e5core.synth.report import make_report, show_report, write_report
from e5core.synth.settings import SynthConfig

PLAIN_EVERY_S = 10.0


class SynthProgress(Display):
    """Progress of a run: accepted records, rate, money, rejected replies."""

    def __init__(self, run: Run) -> None:
        super().__init__("record", run.config.synth.n_records, _say)
        self.run, self.n_first, self.n_shown, self.plain_s = run, run.store.n_records, 0, 0.0
        self.rejected: Counter[str] = Counter()

    def advance(self, outcome: Outcome) -> None:
        """Count an outcome and show how far the run is."""
        if outcome.reason:
            self.rejected[outcome.reason] += 1
        n_records, seconds = self.run.store.n_records, time.monotonic() - self.started_s
        due = seconds - self.plain_s >= PLAIN_EVERY_S or n_records == self.total != self.n_shown
        if due:
            self.plain_s, self.n_shown = seconds, n_records
        rate = (n_records - self.n_first) / seconds
        money, rejected = self.run.ledger.spent.money / TRILLION, self.rejected.total()
        figures = f"per_minute {60 * rate:,.0f} cost {money:.4f} rejected {rejected:,}"
        left_s = max(0, self.total - n_records) / rate if rate else 0.0
        self.show(min(n_records, self.total), figures, left_s, due)


def synthesise(config: SynthConfig, against: Path | None) -> None:
    """Run to the end and write the outputs; also where the run stops early, from what there is then.

    Raises what Run, Run.outcomes and write_outputs raise.
    """
    evaluation = None if against is None else evaluation_hashes(against)
    training = write_training(config)
    with Run(config, evaluation) as run:
        write_config(config, run.out / "config.toml")
        try:
            asyncio.run(_ask(run))
        except RuntimeError:
            if run.store.n_records:
                _write(run)
            raise
        _write(run)
    if training is not None:
        _say(f"train on it: torchrun --nproc-per-node 1 -m e5core.train {training}")


async def _ask(run: Run) -> None:
    with SynthProgress(run) as progress:
        async for outcome in run.outcomes():
            progress.advance(outcome)


def _write(run: Run) -> None:
    n_written, left_out = write_outputs(run)
    report = make_report(run, n_written, left_out)
    write_report(report, run.out)
    show_report(report, Console(stderr=True))
    _say(f"{n_written:,} records in {run.out / 'records.jsonl'}, the whole report in {run.out / 'report.json'}")


def _say(message: str) -> None:
    sys.stderr.write(message + "\n")
    sys.stderr.flush()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.  Returns the exit status: 0; 2 with one line on stderr for what a user can mend."""
    parser = argparse.ArgumentParser(
        prog="python -m e5core.synth", description=__doc__.split("\n\n")[0], epilog=__doc__.split("\n\n")[1]
    )
    parser.add_argument("config", type=Path, help="TOML file, e.g. configs/synth.toml")
    parser.add_argument("overrides", nargs="*", help="section.key=value, e.g. synth.n_records=1000 budget.money=5.0")
    parser.add_argument("--preview", type=int, metavar="N", help="show N prompts and the cost of the run; send nothing")
    parser.add_argument("--against", type=Path, metavar="DIR", help="leave out records with a text of these test sets")
    arguments = parser.parse_intermixed_args(argv)
    try:
        config = load_config(SynthConfig, arguments.config, arguments.overrides)
        if arguments.preview is not None:
            show_preview(config, arguments.preview, Console())
        else:
            synthesise(config, arguments.against)
    except (ValueError, OSError, RuntimeError) as error:
        reason = "the budget is spent: " if isinstance(error, BudgetSpent) else ""
        _say(f"e5core.synth: {reason}{error}")
        return 2
    except KeyboardInterrupt:
        _say("e5core.synth: interrupted; every answer is kept, start again to go on")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
