"""A training run before it begins: its work, its traffic between ranks, its time, and the settings that suit a card.

Products a token, of N frozen matrix weights, adapters of A numbers, V keys that a token sees on average over layers of
H heads: forward 2 N + 2 A + 4 V H head_dim a layer, backward 2 N + 4 A + 10 V H head_dim (4 N where the matrices are
trained themselves). The last layer has nearly all of them for last tokens alone. The fullest micro-batch is embedded
once, all others twice (step.py). Recompute repeats a part of the forward pass (recompute.py).

Traffic is what one rank receives in a step, and sends as much; n numbers over W ranks cost n (W - 1) / W to gather or
to reduce-scatter, twice that to all-reduce. A model in shards is gathered for every forward and every backward pass
(sharding.py).
"""

import math
from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple, get_args

import torch

from e5core.batches import BatchConfig
from e5core.cards import LINK_EFFICIENCY, MIB, Card
from e5core.memory import Load, Ranks, Setting, Sizes, as_table, ledger, room_numbers
from e5core.recompute import Policy
from e5core.workload import Workload

STRATEGIES = ("none", "hybrid", "full")
FILL = 0.9  # of a card's memory: the ledger's own error and torch's unused pieces stay below the rest
POLICIES: tuple[Policy, ...] = get_args(Policy)
CLOSE = 1.01  # of the least time: that far the simplest strategy and policy are preferred, as listed


class Traffic(NamedTuple):
    """Bytes that a rank receives in a step."""

    units: float  # frozen weights and adapters, gathered before use: can be hidden behind products
    gradients: float  # of what is trained
    candidates: float  # embeddings and their gradients


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """What a setting costs on one rank."""

    setting: Setting
    n_micro_batches: int
    lines: dict[str, int]  # memory.ledger's
    flops: float  # a step
    traffic: Traffic
    compute_s: float  # a step
    gather_s: float
    reduce_s: float

    @property
    def peak_mib(self) -> float:
        """Sum of the ledger: what torch's allocator holds at most."""
        return sum(self.lines.values()) / MIB

    @property
    def hidden_s(self) -> float:
        """A step in which units are gathered while others compute."""
        return max(self.compute_s, self.gather_s) + self.reduce_s

    @property
    def exposed_s(self) -> float:
        """A step in which nothing is hidden."""
        return self.compute_s + self.gather_s + self.reduce_s


def flops_of(
    sizes: Sizes, tokens: float, texts: float, seen: tuple[float, float], policy: Policy
) -> tuple[float, float, float]:
    """Return the products of a forward pass, of a backward pass and of what the policy computes again.

    tokens, texts: how many; of the last layer, all but keys and values is computed for a text's last token alone (by
    a mean over tokens, as of any other).
    seen: keys that a token attends to, itself included, in a layer without window, and those of a last token.
    """
    c, lora = sizes.config, sizes.lora
    q, kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    frozen, adapters = sizes.block, sizes.adapters // c.n_layers
    late_frozen = frozen - 2 * c.dim * kv  # of a layer: what last tokens alone pass in the last one
    late_adapters = adapters - sum(name in lora.targets for name in ("wk", "wv")) * lora.rank * (c.dim + kv)
    is_last = sizes.pooling == "last"
    n_whole, narrow = c.n_layers - is_last, is_last * tokens
    whole, late = n_whole * tokens, is_last * texts  # rows of these parts, all layers together
    scores = late * _keys(seen[1], c.window_of(c.n_layers - 1)) * q
    for layer in range(n_whole):
        scores += tokens * _keys(seen[0] if c.causal else 2 * seen[0] - 1, c.window_of(layer)) * q
    n_frozen = whole * frozen + narrow * (frozen - late_frozen) + late * late_frozen
    n_adapters = whole * adapters + narrow * (adapters - late_adapters) + late * late_adapters
    forward = 2 * (n_frozen + n_adapters) + 4 * scores
    backward = (4 if sizes.full else 2) * n_frozen + 4 * n_adapters + 10 * scores
    adapted = sum(name in lora.targets for name in ("w_gate", "w_up", "w_down"))
    feed = 3 * c.dim * c.hidden_dim + adapted * lora.rank * (c.dim + c.hidden_dim)
    is_read = c.post_norms or "w_down" not in lora.targets  # else w_down's product is not computed again
    spared = 0 if is_read else c.dim * (c.hidden_dim + lora.rank)
    again = {"none": 0, "mlp": 2 * (whole + late) * (feed - spared), "block": forward - 2 * (whole + late) * spared}
    return forward, backward, again[policy]


def _keys(seen: float, window: int | None) -> float:
    return seen if window is None else min(seen, window)


def estimate(sizes: Sizes, work: Workload, setting: Setting, ranks: Ranks, card: Card, dtype: torch.dtype) -> Estimate:
    """Work out memory, traffic and time of one setting."""
    mean = work.batch_size * work.tokens / ranks.world_size  # tokens of a rank in a step
    most = (work.batch_size * work.tokens + 3 * work.spread * math.sqrt(work.batch_size)) / ranks.world_size
    budget = max(setting.micro_batch_tokens, work.longest)
    n_micro = max(1, math.ceil(mean / budget))
    fullest = min(budget, most)
    queries = math.ceil(work.batch_size / ranks.world_size)
    candidates = round(work.batch_size * work.candidates)
    load = Load(
        tokens=round(fullest),
        next_tokens=round(min(budget, max(0.0, most - fullest))),
        all_tokens=round(most),
        texts=queries + math.ceil(candidates / ranks.world_size),
        queries=queries,
        candidates=candidates,
    )
    texts = work.batch_size * (1 + work.candidates) / ranks.world_size
    forward, backward, again = flops_of(sizes, mean, texts, (work.seen, mean / texts), setting.recompute)
    flops = forward * (2 - min(1.0, fullest / mean)) + backward + again
    in_fp8 = sizes.quantised / (sizes.config.n_layers * sizes.block)  # of the products
    seconds_a_flop = (1 - in_fp8 + in_fp8 / (card.fp8_gain or 1)) / card.rate
    device = torch.device(card.kind)
    traffic = traffic_of(sizes, setting.strategy, ranks, n_micro, candidates, dtype, device)
    passes = 3 * n_micro - 1  # each reads the weights once, beside its products
    reading = passes * sizes.matrices(dtype.itemsize) / card.bandwidth
    near, far = card.link * LINK_EFFICIENCY, card.network * LINK_EFFICIENCY
    one_node = ranks.world_size <= ranks.per_node
    wide = near if one_node else far
    return Estimate(
        setting=setting,
        n_micro_batches=n_micro,
        lines=ledger(sizes, setting, ranks, load, dtype, device),
        flops=flops,
        traffic=traffic,
        compute_s=flops * seconds_a_flop + reading,
        gather_s=traffic.units / (near if setting.strategy == "hybrid" else wide),
        reduce_s=(traffic.gradients + traffic.candidates) / wide,
    )


def traffic_of(
    sizes: Sizes,
    strategy: str,
    ranks: Ranks,
    n_micro: int,
    candidates: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Traffic:
    """Count the bytes that a rank receives in a step of n_micro micro-batches, the fullest of which is embedded once.

    candidates: of all ranks.  device: of a kind, on which weights may have room behind them, gathered as they are.
    """
    wide, shards, world = max(4, dtype.itemsize), ranks.shards(strategy), ranks.world_size
    adapters = wide * sizes.adapters
    room = sizes.config.n_layers * room_numbers(sizes, dtype, device)
    blocks = sizes.matrices(dtype.itemsize) + (room + sizes.biases) * dtype.itemsize + wide * sizes.norms
    n_layers = sizes.config.n_layers  # a pass begins with the block that the one before ended with, if it turns round
    n_gathers = n_micro * n_layers + (2 * n_micro - 1) * (n_layers - 1)
    gathered = n_gathers * (blocks + adapters) / n_layers + sizes.root * dtype.itemsize  # the root once a step
    groups = world // shards
    sent = wide * sizes.trained * (n_micro if sizes.full else 1)  # all weights' after every pass, adapters' once a step
    gradients = sent * _part(shards)  # reduce-scattered among the shards, the shards all-reduced over the groups
    gradients += 2 * sent / shards * _part(groups)
    return Traffic(
        units=gathered * _part(shards),
        gradients=gradients,
        candidates=2 * candidates * sizes.config.dim * wide * _part(world),
    )


def _part(n: int) -> float:
    return (n - 1) / n


def fits(found: Estimate, card: Card, ranks: Ranks) -> bool:
    """Say whether a setting's peak leaves a tenth of the card free."""
    framework = card.framework_mib + (card.group_mib if ranks.world_size > 1 else 0)
    return found.peak_mib + framework <= FILL * card.memory_mib


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What was chosen for a run on a card, and beside what."""

    sizes: Sizes
    work: Workload
    ranks: Ranks
    card: Card
    dtype: torch.dtype
    chosen: Estimate
    does_fit: bool
    others: tuple[Estimate, ...]  # the best of each other strategy and recompute policy that fits
    n_tried: int

    @property
    def why(self) -> str:
        """Say in one line what was chosen and why."""
        if self.n_tried == 1:
            return f"{_named(self.chosen)}: as asked for"
        if not self.does_fit:
            return f"{_named(self.chosen)}: NOTHING FITS, and of {self.n_tried} settings this needs least memory"
        rivals = sorted(self.others, key=lambda other: other.hidden_s)[:3]
        beside = "; ".join(f"{_named(other)} {other.hidden_s:,.3g} s" for other in rivals)
        fastest = f"{self.chosen.hidden_s:,.3g} s a step, the least of {self.n_tried} settings as far as they fit"
        fastest += ", or the simplest within 1% of it"
        return f"{_named(self.chosen)}: {fastest}" + (f" (beside: {beside})" if beside else "")


def make_plan(
    sizes: Sizes,
    work: Workload,
    batch: BatchConfig,
    strategy: str,
    ranks: Ranks,
    card: Card,
    dtype: torch.dtype,
) -> Plan:
    """Take what the config says and choose what it leaves to "auto".

    Of the settings that fit, the one of the shortest step; of those within 1% of it, the simplest.
    strategy: "auto" or one of STRATEGIES.  The ranks of a node share a CPU's memory.
    """
    if card.kind == "cpu":
        card = replace(card, memory_mib=card.memory_mib // min(ranks.world_size, ranks.per_node))
    tried = [estimate(sizes, work, setting, ranks, card, dtype) for setting in _open(work, batch, strategy, ranks)]
    fitting = [each for each in tried if fits(each, card, ranks)]
    if fitting:
        limit = CLOSE * min(each.hidden_s for each in fitting)
        chosen = min((each for each in fitting if each.hidden_s <= limit), key=_simplicity)
    else:
        chosen = min(tried, key=lambda each: each.peak_mib)
    best: dict[tuple[str, str], Estimate] = {}
    for each in sorted(fitting, key=lambda each: (each.hidden_s, each.peak_mib)):
        best.setdefault((each.setting.strategy, each.setting.recompute), each)
    best.pop((chosen.setting.strategy, chosen.setting.recompute), None)
    return Plan(
        sizes=sizes, work=work, ranks=ranks, card=card, dtype=dtype, chosen=chosen, does_fit=bool(fitting),
        others=tuple(best.values()), n_tried=len(tried),
    )  # fmt: skip


def _simplicity(found: Estimate) -> tuple[int, int, float]:
    return STRATEGIES.index(found.setting.strategy), POLICIES.index(found.setting.recompute), found.hidden_s


def _open(work: Workload, batch: BatchConfig, strategy: str, ranks: Ranks) -> list[Setting]:
    """List the settings that are to be compared."""
    several_nodes = ranks.world_size > ranks.per_node
    worth = [s for s in STRATEGIES if s == "none" or (ranks.world_size > 1 and (s == "full" or several_nodes))]
    strategies = worth if strategy == "auto" else [strategy]
    policies = POLICIES if batch.recompute == "auto" else [batch.recompute]
    budgets = [batch.micro_batch_tokens]
    if batch.micro_batch_tokens == "auto":
        most = (work.batch_size * work.tokens + 3 * work.spread * math.sqrt(work.batch_size)) / ranks.world_size
        whole = 64 * math.ceil(max(most, work.longest) / 64)  # a step's tokens in one micro-batch
        powers = (n * 2**k for k in range(7, 24) for n in (2, 3))
        budgets = [*(n for n in powers if work.longest <= n < whole), whole]
    return [Setting(*each) for each in product(strategies, budgets, policies)]


def _named(found: Estimate) -> str:
    setting = found.setting
    return f"{setting.strategy} / {setting.micro_batch_tokens:,} tokens / recompute {setting.recompute}"


def describe(plan: Plan) -> str:
    """Write a plan for people: every figure is predicted."""
    c, chosen, card, work, ranks = plan.sizes.config, plan.chosen, plan.card, plan.work, plan.ranks
    setting, traffic = chosen.setting, chosen.traffic
    framework = card.framework_mib + (card.group_mib if ranks.world_size > 1 else 0)
    n_tokens = work.batch_size * work.tokens
    steps = "an unknown number of" if work.n_steps is None else f"{work.n_steps:,}"
    frozen = 0 if plan.sizes.full else plan.sizes.whole
    return f"""predicted, not measured
model      {c.family}, {c.n_layers} blocks, dim {c.dim}; {frozen:,} frozen and {plan.sizes.trained:,} trainable numbers
card       {ranks.world_size} x {card.name}, {card.memory_mib:,} MiB each, {card.flops / 1e12:,.3g} TFLOP/s peak \
({card.source}), {card.efficiency:.3g} of it assumed for a step
run        {steps} steps of {work.batch_size:,} examples, {work.tokens:,.1f} tokens each ({work.source})
setting    {plan.why}
strategy = {setting.strategy}  micro_batch_tokens = {setting.micro_batch_tokens}  recompute = {setting.recompute}
MiB of a rank, at the fullest moment of a step of {chosen.n_micro_batches} micro-batches:
{as_table(chosen.lines)}
  {chosen.peak_mib:>12,.1f}  peak of torch's allocator
  {chosen.peak_mib + framework:>12,.1f}  with what the framework keeps ({framework:,} MiB, assumed); to stay below \
{FILL * card.memory_mib:,.0f}{"" if plan.does_fit else ": IT DOES NOT FIT"}
a step, each rank:
  {chosen.flops / 1e12:>12,.4g}  TFLOP in products, of {n_tokens / ranks.world_size:,.0f} tokens
  {traffic.units / 1e6:>12,.4g}  MB received of gathered units
  {traffic.gradients / 1e6:>12,.4g}  MB received of gradients
  {traffic.candidates / 1e6:>12,.4g}  MB received of candidates and their gradients
  {chosen.compute_s:>12,.4g}  s of products; {chosen.gather_s:,.4g} s of gathering, {chosen.reduce_s:,.4g} s of the rest
  {chosen.hidden_s:>12,.4g}  s with gathering hidden behind products ({n_tokens / chosen.hidden_s:,.0f} tokens/s), \
{chosen.exposed_s:,.4g} s with nothing hidden
the run:
{_length_of_run(chosen, work)}
"""


def _length_of_run(chosen: Estimate, work: Workload) -> str:
    if work.n_steps is None:
        return "  not known: train.epochs counts records, which --assume-lengths leaves unread; give --steps N"
    hidden, exposed = (work.n_steps * seconds / 3600 for seconds in (chosen.hidden_s, chosen.exposed_s))
    n_tokens = work.n_steps * work.batch_size * work.tokens
    return f"  {hidden:>12,.4g}  h with gathering hidden, {exposed:,.4g} h with nothing hidden; {n_tokens / 1e6:,.4g} \
million tokens"
