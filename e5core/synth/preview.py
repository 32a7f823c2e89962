"""What a run would ask and what that would cost, before anything is sent: no key, no network, nothing on disk."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice

from rich.console import Console

from e5core.synth.ledger import TRILLION, price
from e5core.synth.plan import TRIAL_TASK, Ask, Plan
from e5core.synth.settings import SynthConfig
from e5core.synth.wire import body

SAMPLE = 500  # requests of each step that stand for all
BYTES_PER_TOKEN = 4  # of a prompt, roughly
TYPICAL_TOKENS = 300  # of a reply; of data/synthetic's English ones 60 (sts), 265 (short_long), 430 (long_long)


@dataclass(frozen=True, slots=True)
class Estimate:
    """Of a whole run in which every reply is accepted."""

    requests: int
    input_tokens: int
    most_output_tokens: int
    typical_money: float
    most_money: float


def show_preview(config: SynthConfig, n: int, console: Console) -> None:
    """Print n prompts and the estimate.  Raises what Plan raises."""
    plan = Plan(config)
    for ask in islice(_mixed(plan, config.synth.n_records), n):
        prompt, name = ask.prompt, f"{ask.prompt.kind}, {ask.prompt.step} {ask.prompt.index}"
        console.rule(f"{name}: {ask.request.model}{', ' + prompt.language if prompt.language else ''}")
        for message in prompt.messages:
            console.out(f"[{message['role']}]\n{message['content']}", highlight=False)
    found = estimate(config, plan)
    console.rule("estimate")
    console.out(
        f"{found.requests:,} requests if every reply is accepted, reading about {found.input_tokens:,} tokens and "
        f"writing at most {found.most_output_tokens:,}: {found.typical_money:,.2f} at "
        f"{TYPICAL_TOKENS} tokens a reply, at most {found.most_money:,.2f}. Tasks are not known yet; "
        f"{TRIAL_TASK!r} stands in for them.",
        highlight=False,
    )


def estimate(config: SynthConfig, plan: Plan) -> Estimate:
    """Add up the requests of a run; the first SAMPLE of each step stand for the others."""
    models = {model.name: model for model in config.models}
    sums = [0.0] * 4
    n_lists = sum(plan.n_brainstorms().values())
    for asks, n in ((_lists(plan), n_lists), (_examples(plan, config.synth.n_records), config.synth.n_records)):
        sample = list(islice(asks, SAMPLE))
        for ask in sample:
            model, request = models[ask.request.model], ask.request
            n_in = len(body(model, request.messages, request.schema, 1, with_model=True)) // BYTES_PER_TOKEN
            n_out = model.max_output_tokens
            typical = price(model, n_in, min(n_out, TYPICAL_TOKENS)).money
            costs = (n_in, n_out, typical, price(model, n_in, n_out).money)
            sums = [total + cost * n / len(sample) for total, cost in zip(sums, costs, strict=True)]
    total_in, total_out, money, most_money = sums
    n_requests = n_lists + config.synth.n_records
    return Estimate(n_requests, round(total_in), round(total_out), money / TRILLION, most_money / TRILLION)


def _mixed(plan: Plan, n_records: int) -> Iterator[Ask]:
    """One list of tasks of every kind, then examples."""
    return chain(plan.brainstorms(dict.fromkeys(plan.n_brainstorms(), 1)), _examples(plan, n_records))


def _lists(plan: Plan) -> Iterator[Ask]:
    return plan.brainstorms(plan.n_brainstorms())


def _examples(plan: Plan, n_records: int) -> Iterator[Ask]:
    return plan.generates(0, n_records, dict.fromkeys(plan.kinds, 1), lambda kind, number: TRIAL_TASK)
