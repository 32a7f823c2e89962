"""The decoder: one description for Llama, Mistral (arXiv 2310.06825), Qwen (2407.10671, 2505.09388) and Gemma 3
(2503.19786), on packed tokens only. Which of them it is, is said by BackboneConfig's fields alone.

    x = embedding_scale * tok_embeddings[tokens]                 (T, D)
    x = x + attention(attention_norm(x))                         n_layers times; with post_norms both summands
    x = x + w_down(act(w_gate(h)) * w_up(h)),  h = ffn_norm(x)   pass a norm of their own before they are added
    norm(x)                                                      by the caller, on the rows that it needs

The names of the modules are fixed (wq wk wv wo, w_gate w_up w_down): LoRA targets and families.py rely on them. Weights
and the two rotary halves lie as in Hugging Face's files, so nothing is permuted at run time. dtypes: weights and
activations in one dtype; norms, their weights and rotary angles in max(fp32, that dtype); no autocast. Frozen linears
may be in row-wise fp8 (fp8.py): then the norm or gate before them returns Rows, quantised once for all that read it.

What linears read can have `spare` columns behind every row, which are theirs to write (lora.py sets how many).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from e5kernels.adapted import Fp8Weight
from e5kernels.attention import varlen_attention
from e5kernels.fp8 import Rows, add_rms_norm_rows, geglu_rows, swiglu_rows
from e5kernels.fp8_linear import fp8_linear
from e5kernels.last_token import last_token
from e5kernels.rms_norm import add_rms_norm, rms_norm
from e5kernels.rope import rope
from e5kernels.swiglu import geglu, swiglu

_GATED = {"silu": (swiglu, swiglu_rows), "gelu_tanh": (geglu, geglu_rows)}
FP8_LEAVES = ("weight_scale", "weight_t", "weight_t_scale")  # beside weight, as Fp8Weight has them; None without fp8


@dataclass(frozen=True, kw_only=True, slots=True)
class BackboneConfig:
    """What a decoder looks like; weights.read_config fills it from the model's own files."""

    family: str  # its entry in families.FAMILIES
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden_dim: int
    vocab_size: int
    norm_eps: float
    rope_theta: float
    rope_divisors: tuple[float, ...] | None = (
        None  # head_dim / 2 numbers by which the frequencies are divided (scaling)
    )
    rope_dynamic: tuple[float, int] | None = None  # factor and trained length: longer texts have a base of their own
    rope_magnitude: float = 1.0  # of the cosines and sines of layers without a base of their own (YaRN)
    window: int | None = None  # keys a query of a local layer sees, itself included; None = all before it
    global_layers: tuple[int, ...] = ()  # the layers, counted from 0, that see all keys; the others are local
    local_rope_theta: float | None = None  # rotary base of local layers, unscaled; None = as in global layers
    attention_scale: float | None = None  # of q k^T; None = head_dim^-0.5
    embedding_scale: float = 1.0
    qkv_bias: bool = False
    qk_norm: bool = False  # q and k pass a norm, head by head, before they are rotated
    post_norms: bool = False  # attention's and feed_forward's outputs pass a norm before they are added
    activation: Literal["silu", "gelu_tanh"] = "silu"
    max_positions: int
    causal: bool = True

    def __post_init__(self) -> None:
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads must be a multiple of n_kv_heads: got {self.n_heads} and {self.n_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary positions: got {self.head_dim}")
        if self.rope_divisors is not None and len(self.rope_divisors) != self.head_dim // 2:
            raise ValueError(f"rope_divisors must hold {self.head_dim // 2} numbers: got {len(self.rope_divisors)}")

    @property
    def shares_beginnings(self) -> bool:
        """Whether the keys and values of a text's beginning are the same whatever follows it."""
        return self.causal and self.rope_dynamic is None

    def window_of(self, layer: int) -> int | None:
        """Say how many keys a query sees in this layer, None for all."""
        return None if layer in self.global_layers else self.window


class Rotary(NamedTuple):
    """Cosines and sines of every packed token's position, both (T, 1, head_dim / 2), fp32 or fp64."""

    cos: Tensor
    sin: Tensor


class Layout(NamedTuple):
    """Where packed sequences lie, and which rows their queries see.

    cu_seqlens: (N+1,) int32.  positions: (T,) int64.  key_rows: (Tk,) int64, the rows of k and v that the sequences
    see, one sequence after another, with their bounds cu_seqlens_k: (N+1,) int32; both None: each sees its own.
    on_last: if not None, only the last token of every sequence is computed beyond k and v, and this is called there.
    """

    cu_seqlens: Tensor
    positions: Tensor
    key_rows: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    on_last: Callable[[], None] | None = None


class RMSNorm(nn.Module):
    """x / rms(x) * weight, the mean square in max(fp32, x's dtype) (arXiv 1910.07467)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim), requires_grad=False)
        self.eps, self.spare = eps, 0
        self.quantises = False  # for linears in fp8 (fp8.py)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    def branch(self, x: Tensor, added: Tensor | None = None) -> tuple[Tensor, Tensor | Rows]:
        """Return the residual stream h = x + added (T, D) and what leaves it here, norm(h) (T, D + spare)."""
        if self.quantises:
            return add_rms_norm_rows(x, added, self.weight, self.eps)
        return add_rms_norm(x, added, self.weight, self.eps, self.spare)


class FrozenLinear(nn.Module):
    """y = x W^T + b, whose parameters take no gradient and are not initialised (they will be loaded).

    weight: (out, in).  bias: (out,) or None.  In fp8 (fp8.py) weight and FP8_LEAVES are those of an Fp8Weight.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None)
        for leaf in FP8_LEAVES:
            self.register_parameter(leaf, None)

    def forward(self, x: Tensor | Rows) -> Tensor:
        weight = fp8_weight(self)
        return F.linear(plain(x), self.weight, self.bias) if weight is None else fp8_linear(x, weight, self.bias)

    @staticmethod
    def together(x: Tensor | Rows, linears: Sequence[nn.Module]) -> Sequence[Tensor]:
        """Return what linears of this kind make of one x."""
        return [linear(x) for linear in linears]


def read_by(x: Tensor | Rows, *linears: nn.Module) -> tuple[Tensor, ...]:
    """Return what linears make of one x, those of one kind together, for adapters gain by it (lora.py)."""
    kinds: dict[tuple[type, torch.dtype], list[nn.Module]] = {}
    for linear in linears:
        kinds.setdefault((type(linear), linear.weight.dtype), []).append(linear)
    outputs = {}
    for (kind, _), alike in kinds.items():
        outputs |= zip(alike, kind.together(x, alike), strict=True)
    return tuple(outputs[linear] for linear in linears)


class Attention(nn.Module):
    def __init__(self, config: BackboneConfig, window: int | None) -> None:
        super().__init__()
        self.spare = 0
        self.head_dim, self.window, self.causal = config.head_dim, window, config.causal
        self.scale = config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
        q_dim, kv_dim = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.wq = FrozenLinear(config.dim, q_dim, config.qkv_bias)
        self.wk = FrozenLinear(config.dim, kv_dim, config.qkv_bias)
        self.wv = FrozenLinear(config.dim, kv_dim, config.qkv_bias)
        self.wo = FrozenLinear(q_dim, config.dim)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor | Rows, rotary: Rotary, layout: Layout) -> Tensor:
        is_last = layout.on_last is not None
        k, v, *rest = read_by(x, self.wk, self.wv) if is_last else read_by(x, self.wk, self.wv, self.wq)
        k, v = (each.unflatten(-1, (-1, self.head_dim)) for each in (k, v))  # (T, K, hd)
        k = rope(self.k_norm(k), *rotary)
        if layout.key_rows is not None:
            k, v = k.index_select(0, layout.key_rows), v.index_select(0, layout.key_rows)  # (Tk, K, hd)
        if is_last:
            layout.on_last()
            x, rotary, layout = _last_alone(x, rotary, layout)
        q = self.wq(x) if is_last else rest.pop()
        q = rope(self.q_norm(q.unflatten(-1, (-1, self.head_dim))), *rotary)  # (Tq, H, hd)
        out = varlen_attention(
            q,
            k,
            v,
            layout.cu_seqlens,
            scale=self.scale,
            window=self.window,
            causal=self.causal,
            cu_seqlens_k=layout.cu_seqlens_k,
            spare=self.spare,
        )
        return self.wo(out.flatten(1))  # (T, D)


class FeedForward(nn.Module):
    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.w_gate = FrozenLinear(config.dim, config.hidden_dim)
        self.w_up = FrozenLinear(config.dim, config.hidden_dim)
        self.w_down = FrozenLinear(config.hidden_dim, config.dim)
        self.gated, self.gated_rows = _GATED[config.activation]
        self.spare, self.quantises = 0, False  # the latter for w_down in fp8 (fp8.py)

    def forward(self, x: Tensor | Rows) -> Tensor:
        return self.w_down(self.hidden(x))

    def hidden(self, x: Tensor | Rows, is_read: bool = True) -> Tensor | Rows:
        """Return (T, F + spare), what w_down projects back; not is_read: for its adapter alone."""
        gate, up = read_by(x, self.w_gate, self.w_up)
        return self.gated_rows(gate, up) if self.quantises and is_read else self.gated(gate, up, self.spare)


class Block(nn.Module):
    def __init__(self, config: BackboneConfig, window: int | None) -> None:
        super().__init__()
        self.is_local = window is not None
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config, window)
        self.attention_post_norm = RMSNorm(config.dim, config.norm_eps) if config.post_norms else nn.Identity()
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = FeedForward(config)
        self.ffn_post_norm = RMSNorm(config.dim, config.norm_eps) if config.post_norms else nn.Identity()
        self.run: Callable[[Block, Tensor, Rotary, Layout], Tensor] = Block.compute  # or what recompute.py puts here

    def forward(self, x: Tensor, rotary: Rotary, layout: Layout) -> Tensor:
        return self.run(self, x, rotary, layout)

    def compute(self, x: Tensor, rotary: Rotary, layout: Layout) -> Tensor:
        """Do both halves, everything that their gradients need being kept."""
        return self.feed(*self.attend(x, rotary, layout))

    def attend(self, x: Tensor, rotary: Rotary, layout: Layout) -> tuple[Tensor, Tensor]:
        """Do the first half.  Returns its summands, x and attention: the norm that comes next adds them."""
        x, normed = self.attention_norm.branch(x)
        attended = self.attention_post_norm(self.attention(normed, rotary, layout))
        return x if layout.on_last is None else last_token(x, layout.cu_seqlens), attended

    def feed(self, x: Tensor, attended: Tensor | None = None) -> Tensor:
        """Do the second half, h + feed-forward of h = x + attended.

        The sum stands here and not in the next block's norm, which would save a read of (T, D) in seven: what passes
        between blocks is one tensor, for recompute.py to keep and for sharding.py to hang its hooks on.
        """
        x, normed = self.ffn_norm.branch(x, attended)
        return x + self.ffn_post_norm(self.feed_forward(normed))


class Backbone(nn.Module):
    """The decoder without a language-model head; its parameters are uninitialised until weights.load_weights."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.tok_embeddings.weight.requires_grad_(False)
        self.layers = nn.ModuleList(Block(config, config.window_of(i)) for i in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)

    def forward(
        self, tokens: Tensor, cu_seqlens: Tensor, n_shared: int = 0, on_last: Callable[[], None] | None = None
    ) -> Tensor:
        """Run the decoder over packed sequences.

        tokens: (T,) int64.  cu_seqlens: (N+1,) int32.  n_shared: where not 0, the first sequence has so many tokens
        and begins all others, which are packed without it (causal attention only: there it depends on none of them).
        on_last: compute, in the last layer, only the sequences' last tokens once k and v of all are there; called then.
        Returns (T, D), with on_last (N, D), in the weights' dtype, before the final norm (`backbone.norm`), which
        last-token pooling needs on N rows only.
        Raises ValueError for a shared beginning whose keys depend on what follows.
        """
        config = self.config
        if n_shared and not config.shares_beginnings:
            raise ValueError(
                f"a beginning of {n_shared} tokens cannot be shared under bidirectional attention or dynamic scaling"
            )
        x = self.tok_embeddings(tokens)  # (T, D)
        if config.embedding_scale != 1.0:
            x = x * torch.full((), config.embedding_scale, dtype=x.dtype, device=x.device)  # rounded, as transformers'
        layout = layout_of(cu_seqlens, tokens.shape[0], n_shared)
        theta = config.rope_theta
        if config.rope_dynamic is not None:
            theta = stretched_theta(cu_seqlens, tokens.shape[0], config, x.dtype)
        rotary = local_rotary = rotary_of(layout.positions, theta, config.rope_divisors, config.head_dim, x.dtype)
        if config.rope_magnitude != 1.0:
            rotary = local_rotary = Rotary(*(config.rope_magnitude * part for part in rotary))
        if config.local_rope_theta is not None:
            local_rotary = rotary_of(layout.positions, config.local_rope_theta, None, config.head_dim, x.dtype)
        for i, layer in enumerate(self.layers):
            if i == config.n_layers - 1:
                layout = layout._replace(on_last=on_last)
            x = layer(x, local_rotary if layer.is_local else rotary, layout)
        return x


def fp8_weight(linear: nn.Module) -> Fp8Weight | None:
    """Return a frozen linear's weight in fp8; None where it is held in the backbone's dtype."""
    if linear.weight_scale is None:
        return None
    return Fp8Weight(linear.weight, linear.weight_scale, linear.weight_t, linear.weight_t_scale)


def plain(x: Tensor | Rows) -> Tensor:
    """Return activations as they are without fp8."""
    return x.x if isinstance(x, Rows) else x


def positions_of(cu_seqlens: Tensor, n_tokens: int) -> Tensor:
    """Number the tokens of every sequence from 0.  cu_seqlens: (N+1,) int32.  Returns (T,) int64."""
    starts = cu_seqlens[:-1].long().repeat_interleave(cu_seqlens.diff(), output_size=n_tokens)
    return torch.arange(n_tokens, device=cu_seqlens.device) - starts


def layout_of(cu_seqlens: Tensor, n_tokens: int, n_shared: int) -> Layout:
    """Lay out sequences of which the first, where n_shared is not 0, begins all others.  cu_seqlens: (N+1,) int32."""
    positions = positions_of(cu_seqlens, n_tokens)
    if not n_shared:
        return Layout(cu_seqlens, positions)
    positions[n_shared:] += n_shared
    n_bounds = cu_seqlens.shape[0]
    n_copies = torch.arange(-1, n_bounds - 1, device=cu_seqlens.device, dtype=torch.int32).clamp(min=0)  # up to a bound
    cu_seqlens_k = cu_seqlens + n_shared * n_copies
    positions_k = positions_of(cu_seqlens_k, n_tokens + n_shared * (n_bounds - 2))
    is_own = positions_k >= n_shared  # such rows follow one another, as they are packed
    key_rows = torch.where(is_own, n_shared - 1 + is_own.cumsum(0), positions_k)
    return Layout(cu_seqlens, positions, key_rows, cu_seqlens_k)


def _last_alone(x: Tensor | Rows, rotary: Rotary, layout: Layout) -> tuple[Tensor | Rows, Rotary, Layout]:
    """Keep of every sequence the last token, as the one query of all its keys."""
    bounds, last = layout.cu_seqlens, layout.cu_seqlens[1:].long() - 1
    alone = torch.arange(bounds.shape[0], dtype=torch.int32, device=bounds.device)
    keys = bounds if layout.cu_seqlens_k is None else layout.cu_seqlens_k
    rotary = Rotary(*(part.index_select(0, last) for part in rotary))
    kept = last_token(plain(x), bounds)
    x = x.gathered(kept, last) if isinstance(x, Rows) else kept
    return x, rotary, layout._replace(cu_seqlens=alone, cu_seqlens_k=keys)


def stretched_theta(cu_seqlens: Tensor, n_tokens: int, config: BackboneConfig, dtype: torch.dtype) -> Tensor:
    """Give every text that is longer than the trained length a rotary base by its length (dynamic NTK-aware scaling).

    cu_seqlens: (N+1,) int32.  Returns (T, 1, 1) in max(fp32, dtype).
    """
    factor, trained = config.rope_dynamic
    lengths = cu_seqlens.diff().to(torch.promote_types(dtype, torch.float32)).clamp(min=trained)  # (N,)
    stretch = factor * lengths / trained - (factor - 1)
    thetas = config.rope_theta * stretch ** (config.head_dim / (config.head_dim - 2))
    return thetas.repeat_interleave(cu_seqlens.diff(), output_size=n_tokens)[:, None, None]


def rotary_of(
    positions: Tensor, theta: float | Tensor, divisors: tuple[float, ...] | None, head_dim: int, dtype: torch.dtype
) -> Rotary:
    """Compute the rotary angles of the given positions (arXiv 2104.09864), in max(fp32, dtype).

    positions: (T,) int64.  theta: one base, or (T, 1, 1).  divisors: of the head_dim / 2 frequencies.
    Returns two (T, 1, head_dim / 2).
    """
    wide = torch.promote_types(dtype, torch.float32)
    frequencies = theta ** -(torch.arange(0, head_dim, 2, device=positions.device, dtype=wide) / head_dim)
    if divisors is not None:
        # from a copy that no GPU is waited for
        frequencies = frequencies / torch.tensor(divisors, dtype=wide).to(positions.device, non_blocking=True)
    angles = positions.to(wide)[:, None, None] * frequencies  # (T, 1, head_dim / 2)
    return Rotary(angles.cos(), angles.sin())
