"""What a run's folder says of itself, as parts of an HTML page (page.py); no model is loaded here.

Everything may be missing that a run writes late: a run that still goes on, or was stopped, is shown as far as it came.
"""

import json
import math
import re
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from statistics import fmean
from typing import Any

from e5core import checkpoint
from e5core.config import existing, load_config, read_json
from e5core.drawing import Point, line_chart, number
from e5core.mixture import Mixture
from e5core.page import Markup, bars, breakable, facts, figure, folded, joined, section, table, tag
from e5core.records import parse_object
from e5core.run import PREEMPTED, Config, total_steps

ELSEWHERE = {"train.run", "train.resume", "train.overwrite", "data.sources", "eval.sets", "eval.report"}
LEDGER_LINE = re.compile(r" +([\d,]+\.\d)  (\S.*)")
MEASURED = re.compile(r"memory: ([\d,]+) MiB predicted, ([\d,]+) MiB measured after a step \((.*)\)")
SHARE_OF_END = 10  # the last tenth of the steps stands for how the run ended


@dataclass(frozen=True, slots=True)
class RunFolder:
    """What is read of a run's folder."""

    path: Path
    config: Config
    metrics: list[dict[str, Any]]  # at least one line
    plan: str  # "" where there is none
    scores: dict[str, dict[str, float]]

    @property
    def n_done(self) -> int:
        """The last finished step."""
        return self.metrics[-1]["step"]

    @property
    def planned_steps(self) -> int | None:
        """How many steps the run is to have, by its config or its plan."""
        found = re.search(r"^run +([\d,]+) steps", self.plan, re.MULTILINE)
        return self.config.train.steps or (int(found[1].replace(",", "")) if found else None)

    def series(self, key: str) -> list[Point]:
        """Return (step, value) of every line that has this number."""
        found = ((line["step"], line.get(key)) for line in self.metrics)
        return [(step, value) for step, value in found if isinstance(value, int | float) and math.isfinite(value)]


def read_run(path: Path) -> RunFolder:
    """Read a run's folder.

    Raises FileNotFoundError for no folder, no run or no finished step, ValueError for a file that cannot be read.
    """
    existing(path, "RUN")
    if not (path / "config.toml").is_file():
        raise FileNotFoundError(f"{path}: no run folder, it has no config.toml; name the folder that train.run names")
    config, file = load_config(Config, path / "config.toml"), path / "metrics.jsonl"
    lines = file.read_bytes().split(b"\n")[:-1] if file.is_file() else []  # behind the last \n: cut by a kill, or ""
    metrics = [parse_object(raw, f"{file}:{i}") for i, raw in enumerate(lines, start=1)]
    if not metrics:
        raise FileNotFoundError(
            f"{file}: no finished step in it, so there is nothing to report; let e5core.train do a step and try again"
        )
    for i, line in enumerate(metrics, start=1):
        if not isinstance(line.get("step"), int):
            raise ValueError(f"{file}:{i} must be an object with an integer step; mend or remove that line")
    plan, scores = path / "plan.txt", path / "evaluation.json"
    return RunFolder(
        path, config, metrics, plan.read_text(encoding="utf-8") if plan.is_file() else "",
        read_json(scores) if scores.is_file() else {},
    )  # fmt: skip


def head(run: RunFolder, mixture: Mixture | None) -> Markup:
    """Say what the run is and how it ended."""
    config, done = run.config, run.n_done
    total = run.planned_steps or (total_steps(config, mixture) if mixture else None)
    if (run.path / PREEMPTED).is_file():
        state = f"Stopped by SIGTERM after step {done:,}; train.resume=true goes on."
    elif total is None or done < total:
        state = f"Unfinished: {done:,} of {f'{total:,}' if total else 'an unknown number of'} steps."
    elif config.eval.report and "after" not in run.scores:
        state = f"All {done:,} steps are done; the evaluation after them is missing."
    else:
        state = f"Finished: {done:,} steps."
    lora, what = config.lora, Path(config.backbone.path).name
    trained = "all its weights trained" if config.train.full else f"LoRA of rank {lora.rank}"
    told = f"{what} with {trained}, in batches of {config.batch.size:,} examples from "
    told += f"{len(config.data.sources)} {'source' if len(config.data.sources) == 1 else 'sources'}."
    return joined([
        tag("div", "e5core training run", css="kicker"), tag("h1", run.path.resolve().name),
        tag("p", f"{told} {state}"), tag("div", *_tiles(run), css="tiles"),
    ])  # fmt: skip


def _tiles(run: RunFolder) -> list[Markup]:
    tiles, firsts = [], {}
    for name, score in run.scores.get("after", {}).items():
        firsts.setdefault(name.rpartition("/")[0], (name, score))
    for name, after in list(firsts.values())[:3]:
        before = run.scores.get("before", {}).get(name)
        told = f"{name}, %" + ("" if before is None else f"; {before:.1f} before training")
        tiles.append((f"{after:.1f}", told))
    for key, name in (("loss", "loss"), ("in_batch_accuracy", "in-batch accuracy")):
        if points := run.series(key):
            last = [value for _, value in points[-math.ceil(len(points) / SHARE_OF_END) :]]
            of = "last step" if len(last) == 1 else f"mean of the last {len(last)} steps"
            tiles.append((number(fmean(last)), f"{name}, {of}; {number(points[0][1])} at step {points[0][0]}"))
    tokens, seconds = (sum(value for _, value in run.series(key)) for key in ("tokens", "seconds"))
    if seconds:
        tiles.append((f"{tokens / seconds:,.0f}", f"tokens/s; {tokens:,} tokens in {_duration(seconds)} of steps"))
    return [tag("div", tag("b", big), tag("span", told), css="tile") for big, told in tiles]


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def scores(run: RunFolder) -> Markup:
    """Show the evaluation before and after training."""
    before, after = run.scores.get("before", {}), run.scores.get("after", {})
    if not before and not after:
        why = "eval.report names no set." if not run.config.eval.report else "The run has not come to it yet."
        return section("Scores before and after", f"There are none: {why}")
    rows = []
    for name in dict.fromkeys([*before, *after]):
        was, now = before.get(name), after.get(name)
        change = "–" if was is None or now is None else f"{now - was:+.1f}"
        shown = bars([((value or 0.0) / 100, color) for value, color in ((was, 2), (now, 0))])
        cells = ["–" if value is None else f"{value:.1f}" for value in (was, now)]
        set_name, _, metric = name.rpartition("/")
        named = joined([set_name, Markup("<br>"), tag("span", metric, css="soft")])
        rows.append([named, *cells, change, shown])
    head_ = ["set", "before", "after", "change", "0 to 100%"]
    lead = "In percent, by the protocol of e5core.evaluate. Look for a gain on every set: one that falls while others "
    lead += "rise shows what the training data lack. Grey is before, blue after."
    return section("Scores before and after", lead, table(head_, rows, ["words", "n", "n", "n", "bars"], "", ""))


def trained(run: RunFolder, mixture: Mixture | None, note: str) -> Markup:
    """Show what was trained on what.  note: what is to be said of the records."""
    config, steps = run.config, checkpoint.steps_of(run.path)
    told = {"backbone": config.backbone.path}
    for line in ("model", "card", "setting"):
        if found := re.search(rf"^{line} +(.*)", run.plan, re.MULTILINE):
            told[{"model": "model", "card": "planned for", "setting": "micro-batches"}[line]] = found[1]
    lora = config.adapters
    if lora is None:
        told["trained"] = "all weights, kept in fp32"
    else:
        told["adapters"] = f"rank {lora.rank}, alpha {number(lora.alpha)}, dropout {number(lora.dropout)} on "
        told["adapters"] += ", ".join(lora.targets)
    told["longest text"] = f"{config.batch.max_tokens:,} tokens in training, {config.eval.max_tokens:,} in evaluation"
    if steps:
        try:
            sha256 = checkpoint.read_card(checkpoint.step_folder(run.path, steps[-1])).base_sha256
        except (OSError, ValueError) as error:
            sha256 = str(error)
        told["base weights, SHA-256"] = sha256
    rows = []
    shares = mixture.shares if mixture else [None] * len(config.data.sources)
    for source, share in zip(config.data.sources, shares, strict=True):
        rate = f"ratio {number(source.ratio)}" if source.weight is None else f"weight {number(source.weight)}"
        counted = ["–", "–"] if share is None else [f"{share[0]:,}", f"{share[1]:,}"]
        rows.append([joined([breakable(source.path), Markup("<br>"), tag("span", rate, css="soft")]), *counted])
    data = table(["source", "records", "drawn an epoch"], rows, ["words", "n", "n"], "Training records", note)
    rows = _settings(config)
    differing = table(["setting", "value", "default"], rows, ["", "", ""], "Settings that are not the default", "")
    whole = tag("div", facts(told), differing, data, css="grid")
    return section("What was trained on what", "The whole config is at the end of the page.", whole)


def _settings(config: Config) -> list[list[str]]:
    """List dotted key, value and default of every setting that has a default and differs from it."""
    rows, values = [], asdict(config)
    for part in fields(Config):
        for field in fields(part.type):
            value, dotted = values[part.name][field.name], f"{part.name}.{field.name}"
            if field.default is not MISSING and value != field.default and dotted not in ELSEWHERE:
                shown = (_value(each) for each in (value, field.default))
                rows.append([tag("code", breakable(dotted), css="words"), *shown])
    return rows


def _value(value: object) -> Markup:
    """Show a setting's value; a short one is never broken in two."""
    text = "none" if value in (None, ()) else json.dumps(value)
    return tag("code", text, css="words" if len(text) <= 16 else "")


def curves(run: RunFolder) -> Markup:
    """Draw what metrics.jsonl says of every step."""
    negatives = [value for _, value in run.series("negatives_per_query")]
    mean = fmean(negatives) if negatives else 0.0
    even = (math.log1p(mean), f"all alike: {number(math.log1p(mean))}") if mean else None
    chance = (1 / (1 + mean), f"chance: {number(1 / (1 + mean))}") if mean else None
    clip = (run.config.optim.clip, f"clipped to {number(run.config.optim.clip)}")
    shown = [
        ("loss", "Loss (InfoNCE, nats)", even, False,
         "Look for a steep fall that levels off. Dashed: the loss of a model that finds all candidates alike, "
         "ln(1 + negatives of a query); at the start it may well be higher, since a low temperature punishes errors."),
        ("in_batch_accuracy", "In-batch accuracy (share of queries)", chance, False,
         "How often a query's positive comes before all its negatives in the batch. Look for a rise that holds; near "
         "the dashed line nothing has been learnt."),
        ("lr", "Learning rate (of an update)", None, False,
         "Warm-up, then a straight fall towards 0. If the loss jumps where this is highest, the rate is too high."),
        ("grad_norm", "Gradient norm (L2, log scale)", clip, True,
         "Before clipping: above the dashed line a step's gradient is scaled down to it. A lone spike is harmless; a "
         "level that keeps rising says that training is about to diverge."),
        ("tokens_per_s", "Speed (real tokens/s, all ranks)", None, False,
         "Look for a level line. The first step, also after a restart, is slower; a lasting drop means that the "
         "machine was shared, or waited for data."),
        ("truncated", "Texts cut to batch.max_tokens (a step)", None, False,
         f"Of about {run.config.batch.size * (2 + run.config.batch.negatives):,} texts or fewer. If most are cut, the "
         "model never sees how they end: raise batch.max_tokens."),
    ]  # fmt: skip
    charts = [
        figure(title, line_chart(points, name=title, mark=mark, log=log), caption)
        for key, title, mark, log, caption in shown
        if (points := run.series(key))
    ]
    lead = f"{len(run.metrics):,} steps of metrics.jsonl. Point at a curve to read its values."
    return section("Training", lead, tag("div", *charts, *_score_charts(run), css="grid"))


def _score_charts(run: RunFolder) -> list[Markup]:
    """Draw the scores that were taken during training, a chart each."""
    found: dict[str, list[Point]] = {}
    for line in run.metrics:
        for name, value in line.get("eval", {}).items():
            found.setdefault(name, []).append((line["step"], value))
    best = checkpoint.read_best(run.path)
    caption = "Taken during training. Look for where it stops rising: later steps only fit the training data."
    if best:
        caption += f" Kept as the best checkpoint: step {best['step']:,}, by {best['metric']}."
    return [figure(f"{name} (%)", line_chart(points, name=name), caption) for name, points in found.items()]


def memory(run: RunFolder) -> Markup:
    """Show the plan's memory beside what was measured."""
    ledger = run.plan.partition("MiB of a rank")[2].partition("\na step, each rank")[0].splitlines()[1:]
    lines = [(line[2].strip(), float(line[1].replace(",", ""))) for text in ledger if (line := LEDGER_LINE.match(text))]
    if not lines:
        return section("Memory", "The folder holds no plan.txt with a memory ledger, so there is nothing to compare.")
    measured = MEASURED.search(run.plan)
    said = "Not measured yet: that comes after the first step."
    totals = []
    if measured:
        predicted, found = (float(measured[i].replace(",", "")) for i in (1, 2))
        totals = [("predicted, as measured below", predicted, 1), (f"measured ({measured[3]})", found, 1)]
        share = 100 * found / predicted - 100
        said = f"Measured was {abs(share):.0f}% {'above' if share > 0 else 'below'} the prediction."
    wide = max(value for _, value, *_ in [*lines, *totals])
    colored = [(name, value, 0 if place < len(lines) - 2 else 2) for place, (name, value) in enumerate(lines)] + totals
    rows = [
        [name, f"{value:,.0f}" if value >= 10 else number(value), bars([(value / wide, color)])]
        for name, value, color in colored
        if value
    ]
    caption = "Look for the largest line, which is where to save: activations by batch.micro_batch_tokens or "
    caption += "batch.recompute, weights by sharding or dtype. Blue adds up to grey; orange was compared after a step."
    lead = f"One rank in MiB at the fullest moment of a step, by plan.txt. {said}"
    return section(
        "Memory, planned and measured", lead, table(["what", "MiB", ""], rows, ["", "n", "bars"], "", caption)
    )


def appendix(run: RunFolder) -> Markup:
    """Show the folder's own texts, folded."""
    parts = [folded("plan.txt: memory, traffic and time as planned", run.plan)] if run.plan else []
    tokens = run.path / "tokens.txt"
    if tokens.is_file():
        text = tokens.read_text(encoding="utf-8")
        parts.insert(0, folded("tokens.txt: one example with its exact ids, as the model sees it", text))
    config = (run.path / "config.toml").read_text(encoding="utf-8")
    lead = "Look into tokens.txt first when a run does badly: a wrong instruction or a text cut short shows there."
    return section("The run's own files", lead, *parts, folded("config.toml: every setting", config))
