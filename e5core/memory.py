"""What a rank holds at the fullest moment of a step, by arithmetic: no weights are loaded.

That moment is in the backward pass, when it reaches the feed-forward of the last block but one and no activation before
it is free yet; the last block, which has little but keys and values of all tokens, is done and free by then. (Pooled
by a mean, the last block is as full as the others, and that moment is at its feed-forward.) By kernels without
recompute it may be in the last block, when its k and v take their gradients.
Kept till then, a token and block (e bytes an element; w = max(4, e); adapters on all linears, R wide; compiled ops):

    attention      x, its rms (w), h = norm(x), q, k turned, v, out, log-sum-exp (H w), z of wq wk wv wo
    feed-forward   x, its rms (w), h = norm(x), gate, up, act(gate) * up, z of w_gate w_up w_down

Recompute "mlp" keeps of the feed-forward x alone, "block" keeps of a block x alone; that block's share is then
computed again while all the others' is there. The first block's x is the embedding, which needs no gradient, so its
attention keeps none. Where an op has no compiled face on the device, its reference keeps more, and so it is counted:
x in fp32 under a norm, act(gate), and attention's output twice. Where lora_linear takes linear and adapter as one
product, what adapted linears read has spare columns, and so many rows are behind their weights (lora.make_room).
"""

import resource
import sys
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch

from e5core.backbone import Backbone, BackboneConfig
from e5core.cards import MIB
from e5core.encoder import Pooling
from e5core.fp8 import apply_fp8
from e5core.lora import LINEARS, READERS, LoraConfig, adapted_readers, adapters, apply_lora
from e5core.recompute import Policy
from e5kernels import attention, dropout, fp8, infonce, lora_linear, rms_norm, swiglu
from e5kernels.lora_linear import room_of

# What linears keep whose own weights are trained is what adapters keep beside z: their input, once for those of one.
_WHOLE = LoraConfig(rank=0, dropout=0.0)


class Sizes(NamedTuple):
    """How many numbers a model has, and its shape."""

    config: BackboneConfig
    lora: LoraConfig
    block: int  # in the frozen matrices of one block
    norms: int  # in all norms
    root: int  # in the token embeddings
    adapters: int  # trainable
    biases: int
    pooling: Pooling = "last"
    quantised: int = 0  # of all blocks' frozen matrices in fp8, each held twice
    scales: int = 0  # of these, fp32
    widest: int = 0  # the largest of these matrices
    full: bool = False  # all weights are trained, and there are no adapters
    n_with_room: tuple[int, ...] = (0,) * len(READERS)  # of each of these, in how many blocks room suits its weights

    @property
    def whole(self) -> int:
        """Numbers of the model itself."""
        return self.config.n_layers * self.block + self.norms + self.biases + self.root

    @property
    def trained(self) -> int:
        """Numbers that are trained."""
        return self.whole if self.full else self.adapters

    def matrices(self, itemsize: int) -> int:
        """Return the bytes of all blocks' frozen matrices, itemsize each number that is not in fp8."""
        return (self.block * self.config.n_layers - self.quantised) * itemsize + 2 * self.quantised + 4 * self.scales


class Setting(NamedTuple):
    """What plan chooses."""

    strategy: str  # none, hybrid, full
    micro_batch_tokens: int
    recompute: Policy


class Ranks(NamedTuple):
    """How many processes, and how many of them share a node."""

    world_size: int
    per_node: int = 8

    def shards(self, strategy: str) -> int:
        """Return among how many ranks the model is divided."""
        return {"none": 1, "hybrid": min(self.world_size, self.per_node), "full": self.world_size}[strategy]


class Load(NamedTuple):
    """What one rank has of one step."""

    tokens: int  # of its fullest micro-batch
    next_tokens: int  # of the one after it, 0 where there is none
    all_tokens: int  # of the rank in the step
    texts: int  # of the rank in the step
    queries: int
    candidates: int  # of all ranks


def sizes_of(
    config: BackboneConfig, lora: LoraConfig | None, pooling: Pooling = "last", fp8_skip: Sequence[str] | None = None
) -> Sizes:
    """Count a model's numbers on the model itself, without memory for them.

    lora: None: all weights are trained.  fp8_skip: the linears that are not in fp8; None: all.
    Raises what apply_fp8 raises.
    """
    with torch.device("meta"):
        backbone = Backbone(config)
        if lora is not None:
            apply_lora(backbone, lora)
    own = {name: p.numel() for name, p in backbone.named_parameters() if not p.requires_grad}
    norms = sum(n for name, n in own.items() if "norm" in name)
    biases = sum(n for name, n in own.items() if name.endswith(".bias"))
    root = own["tok_embeddings.weight"]
    trainable = sum(linear.lora_a.numel() + linear.lora_b.numel() for _, linear in adapters(backbone))
    block = (sum(own.values()) - norms - biases - root) // config.n_layers
    sizes = Sizes(config, lora or _WHOLE, block, norms, root, trainable, biases, pooling, full=lora is None)
    if fp8_skip is not None:
        apply_fp8(backbone, fp8_skip)
        sizes = _in_fp8(sizes, backbone)
    n_blocks = Counter(place for place, *_ in adapted_readers(backbone))
    return sizes._replace(n_with_room=tuple(n_blocks[place] for place in range(len(READERS))))


def _in_fp8(sizes: Sizes, backbone: Backbone) -> Sizes:
    codes = [p.numel() for name, p in backbone.named_parameters() if name.endswith(".weight") and p.dtype == fp8.E4M3]
    scales = sum(p.numel() for name, p in backbone.named_parameters() if name.endswith("_scale"))
    return sizes._replace(quantised=sum(codes), scales=scales, widest=max(codes))


def room_numbers(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> int:
    """Count the numbers for which one block's weights have room behind them, on average over the blocks."""
    c = sizes.config
    q, kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    widths = dict(zip(LINEARS, (q, kv, kv, c.dim, c.hidden_dim, c.hidden_dim, c.dim), strict=True))
    n_out = sum(n * widths[name] for n, readers in zip(sizes.n_with_room, READERS, strict=True) for name in readers)
    return room_of(sizes.lora.rank, dtype, device) * n_out // c.n_layers


def ledger(
    sizes: Sizes, setting: Setting, ranks: Ranks, load: Load, dtype: torch.dtype, device: torch.device
) -> dict[str, int]:
    """Return the bytes of a rank by what they are for; their sum is its peak (what its framework keeps comes on top).

    device: of a kind; it need not be there.
    """
    if sizes.full:
        return _full_ledger(sizes, setting, ranks, load, dtype, device)
    e, wide, n_layers = dtype.itemsize, max(4, dtype.itemsize), sizes.config.n_layers
    shards = ranks.shards(setting.strategy)
    matrices = sizes.matrices(e) // n_layers + e * room_numbers(sizes, dtype, device)
    block = matrices + wide * sizes.norms // n_layers + e * sizes.biases // n_layers
    own_adapters = wide * sizes.adapters // shards
    gathered = 2 * (block + wide * sizes.adapters // n_layers) + e * sizes.root  # which stays whole beside two blocks
    tokens = _Tokens(sizes, dtype, device)
    kept_first = tokens.kept(setting.recompute, load.tokens)
    first = kept_first + tokens.working(setting.recompute, load.tokens)
    later = tokens.kept(setting.recompute, load.next_tokens) + tokens.working(setting.recompute, load.next_tokens)
    gradients = wide * sizes.adapters if later + wide * sizes.adapters > first else 0  # the fullest goes first
    at_peak = load.next_tokens if gradients else load.tokens
    kept, working = tokens.kept(setting.recompute, at_peak), tokens.working(setting.recompute, at_peak)
    in_loss = kept_first + tokens.last_kept(setting.recompute, load) + _loss_bytes(sizes, load, wide, device)
    summed = 0 if ranks.world_size == 1 else 2 * wide * sizes.adapters - gradients  # when nothing is kept any more
    return {
        "frozen weights": (block * n_layers + e * sizes.root) // shards,
        "gathered units": 0 if setting.strategy == "none" else gathered,
        "adapters (fp32)": own_adapters,
        "gradients of adapters": gradients,
        "AdamW's moments": 2 * own_adapters,
        "activations kept": kept,
        "working memory (backward pass)": working,
        "loss, beyond the backward pass": max(0, in_loss - gradients - kept - working),
        "token ids, embeddings and their gradient": 8 * load.all_tokens + 3 * load.texts * sizes.config.dim * wide,
        "communication, beyond the backward pass": max(0, summed - kept - working),
    }


def _full_ledger(
    sizes: Sizes, setting: Setting, ranks: Ranks, load: Load, dtype: torch.dtype, device: torch.device
) -> dict[str, int]:
    """Return the ledger where all weights are trained: in units that are gathered and reduced, be it on one rank.

    The fullest moment is in the first backward pass, when few gradients are there yet; or in a later one, when all are;
    or at a pass's end, when the token embeddings' is added to them.
    """
    e, wide, shards = dtype.itemsize, max(4, dtype.itemsize), ranks.shards(setting.strategy)
    block, root = (sizes.whole - sizes.root) // sizes.config.n_layers, sizes.root
    masters, tokens = wide * sizes.whole // shards, _Tokens(sizes, dtype, device)
    done = int(sizes.pooling == "last")  # blocks, at the last but one
    moments = [(masters, 0, 0, (e + wide) * root)]
    for n_tokens, gradients in ((load.tokens, done * wide * block // shards), (load.next_tokens, masters)):
        working = tokens.working(setting.recompute, n_tokens)
        # the unit's in hand: all where nothing is replayed first, else w_down's; or those of the last one, added up
        own = block if setting.recompute == "none" else sizes.config.dim * sizes.config.hidden_dim
        flat = max(e * own, (e + wide) * block - working)
        moments.append((gradients, tokens.kept(setting.recompute, n_tokens), working, flat) if n_tokens else (0,) * 4)
    gradients, kept, working, flat = max(moments, key=sum)
    in_loss = tokens.kept(setting.recompute, load.tokens) + tokens.last_kept(setting.recompute, load)
    in_loss += _loss_bytes(sizes, load, wide, device)
    return {
        "masters (fp32)": masters,
        "gathered units": e * (2 * block + root),
        "gradients of masters": gradients,
        "AdamW's moments": 2 * masters,
        "activations kept": kept,
        "working memory (backward pass)": working,
        "a unit's gradients": flat,
        "loss, beyond the backward pass": max(0, in_loss - gradients - kept - working - flat),
        "token ids, embeddings and their gradient": 8 * load.all_tokens + 3 * load.texts * sizes.config.dim * wide,
        "sums over ranks": 0 if ranks.world_size == 1 else wide * block // shards,
    }


def as_table(lines: dict[str, int]) -> str:
    """Write a ledger in MiB, a line each."""
    return "\n".join(f"  {n_bytes / MIB:>12,.1f}  {name}" for name, n_bytes in lines.items())


def measured_peak(device: torch.device) -> tuple[float, str]:
    """Return the most MiB that this process has held so far, and what is counted."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MIB, "by torch's allocator"
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MIB, "resident, loading and evaluation included"


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an error means that there is no more memory: Python's, CUDA's, or of torch's allocator on the CPU."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def _loss_bytes(sizes: Sizes, load: Load, wide: int, device: torch.device) -> int:
    rows = 2 * (load.queries + load.candidates) * sizes.config.dim * wide  # and their gradients
    dense = load.queries * load.candidates
    if infonce.face(device) == "reference":
        return rows + dense * (3 * wide + 3)  # scores and two forms of the logits, three masks
    block = min(dense * wide, infonce.BLOCK_BYTES) if infonce.rows_suit(load.candidates) else 0
    return rows + (1 + infonce.BLOCK_EXTRA) * block


class _Tokens:
    """Bytes that tokens take in the model's graph."""

    def __init__(self, sizes: Sizes, dtype: torch.dtype, device: torch.device) -> None:
        self.c, self.lora, self.pooling, self.widest = sizes.config, sizes.lora, sizes.pooling, sizes.widest
        self.e, self.wide = dtype.itemsize, max(4, dtype.itemsize)
        self.plain = {op: op.face(device) == "reference" for op in (attention, dropout, fp8, rms_norm, swiglu)}
        self.fused = lora_linear.face(device) == "triton" and dtype != torch.float64
        self.plain[rms_norm] |= sizes.full and device.type == "cpu"  # whose compiled op knows no gradient of the weight
        spare, self.full = room_of(sizes.lora.rank, dtype, device), sizes.full
        # columns behind what each of READERS reads, on average over the blocks
        per_block = (spare * n // self.c.n_layers for n in sizes.n_with_room)
        self.spare = dict(zip(READERS, per_block, strict=True))
        self.q, self.kv = self.c.n_heads * self.c.head_dim, self.c.n_kv_heads * self.c.head_dim

    def kept(self, policy: Policy, n_tokens: int) -> int:
        """Return what n_tokens keep until their backward pass begins."""
        c, x = self.c, self.c.dim * self.e
        first = 0 if self.full else self._norm(c.dim)  # the first block's attention_norm has no gradient
        n_layers = c.n_layers if self.pooling != "last" else max(1, c.n_layers - 1)  # the last block's is free
        halves = {
            "none": n_layers * (self.attention() + self.feed()) - first,
            "mlp": n_layers * (self.attention() + x) - first,
            "block": n_layers * x,
        }
        angles = self.c.head_dim * self.wide * (1 if c.local_rope_theta is None else 2)
        return n_tokens * (halves[policy] + angles + 8)  # 8: dropout's key

    def working(self, policy: Policy, n_tokens: int) -> int:
        """Return what the backward pass takes at the last block but one: replayed activations, gradients in flight."""
        x = self.c.dim * self.e
        shared = x if not self.plain[rms_norm] or self.e == self.wide else 0  # the replay's norm keeps the saved x
        replayed = {"none": 0, "mlp": self.feed() - shared + x, "block": self.attention() + self.feed() - shared + x}
        in_flight = self._in_flight()
        if policy == "none" and self.pooling == "last" and self.fused:
            in_flight = max(in_flight, self._last_block())
        peak = n_tokens * (replayed[policy] + in_flight)
        if self.widest and self.plain[fp8]:  # w_down's transposed codes and their places in a table, g's values, dx
            decoded = (self.wide + 4) * self.widest + n_tokens * (x + self.wide * (self.c.dim + self.c.hidden_dim))
            peak = max(peak, n_tokens * replayed[policy] + decoded)
        return peak

    def _in_flight(self) -> int:
        """Return what a token has of gradients while those of gate and up are made."""
        x, f, adapted = self.c.dim * self.e, self.c.hidden_dim, "w_down" in self.lora.targets
        in_flight = x
        if self.c.post_norms:  # by kernels, what such a norm kept is free by then
            in_flight += -self._norm(self.c.dim) if self.fused else x
        is_kept = adapted and not (self.full and self.plain[rms_norm])  # the product, which is free by then
        in_flight += (2 if is_kept else 3) * f * self.e  # of gate, up and the product, less the latter
        if adapted and self.lora.dropout and not self.fused:
            drawn = f * self.e
            if self.plain[dropout]:  # bits, mask, the product in wide, what is chosen from it
                drawn = f * (2 + 2 * self.wide + (self.wide if self.e != self.wide else 0))
            in_flight = max(in_flight, x + 2 * f * self.e + drawn)
        return in_flight

    def last_kept(self, policy: Policy, load: Load) -> int:
        """Return what the fullest micro-batch keeps besides, in the last block, while the loss is computed."""
        if self.pooling != "last":
            return 0
        x, n_last = self.c.dim * self.e, load.texts * load.tokens // load.all_tokens
        if policy == "block":
            return load.tokens * x
        return load.tokens * self._last_kept() + n_last * (self.attention() + (self.feed() if policy == "none" else x))

    def _last_kept(self) -> int:
        """Return what a token keeps in the last block, be it no text's last: x, h, k and v."""
        c, n_adapted = self.c, sum(name in self.lora.targets for name in ("wk", "wv"))
        h = c.dim + self.spare[READERS[0]] + n_adapted * self.lora.rank if n_adapted else 0
        return self._norm(c.dim) + (h + 2 * self.kv) * self.e

    def _last_block(self) -> int:
        """Return what a token has while the last block's k and v, and by them its h and x, take their gradients."""
        return self._last_kept() + (4 * self.c.dim + 3 * self.spare[READERS[0]]) * self.e

    def attention(self) -> int:
        """Return what a token keeps of x + attention(norm(x)) in one block."""
        c, e = self.c, self.e
        kept = self._norm(c.dim) + self._inputs(("wq", "wk", "wv"), c.dim) + self._inputs(("wo",), self.q)
        kept += (self.q + 2 * self.kv) * e + c.n_heads * self.wide
        if self.plain[attention] or "wo" not in self.lora.targets:
            kept += self.q * e  # its output, which wo's adapter keeps too, is no other tensor
        if c.qk_norm:
            kept += (c.n_heads + c.n_kv_heads) * self._norm(c.head_dim)
        return kept + (self._norm(c.dim) if c.post_norms else 0)

    def feed(self) -> int:
        """Return what a token keeps of x + feed_forward(norm(x)) in one block."""
        c = self.c
        kept = self._norm(c.dim) + self._inputs(("w_gate", "w_up"), c.dim) + self._inputs(("w_down",), c.hidden_dim)
        kept += (3 if self.plain[swiglu] else 2) * c.hidden_dim * self.e
        return kept + (self._norm(c.dim) if c.post_norms else 0)

    def _norm(self, width: int) -> int:
        return width * (self.wide if self.plain[rms_norm] else self.e) + self.wide

    def _inputs(self, names: tuple[str, ...], width: int) -> int:
        """Return what the adapters of linears with one input keep: that once, and a z each."""
        n_adapted = sum(name in self.lora.targets for name in names)
        return (width + self.spare[names] + n_adapted * self.lora.rank) * self.e if n_adapted else 0
