"""The decoder: Mistral (arXiv 2310.06825) and Llama 2/3 by one description, on packed tokens only.

    x = tok_embeddings[tokens]                                   (T, D)
    x = x + attention(attention_norm(x))                         n_layers times
    x = x + w_down(silu(w_gate(h)) * w_up(h)),  h = ffn_norm(x)
    norm(x)                                                      by the caller, on the rows that it needs

The names of the modules are fixed (wq wk wv wo, w_gate w_up w_down): LoRA targets and weights.py rely on them. Weights
and the two rotary halves lie as in Hugging Face's files, so nothing is permuted at run time. dtypes: weights and
activations in the weights' dtype; norms and rotary angles in max(fp32, that dtype); no autocast.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from e5core.attention import varlen_attention


@dataclass(frozen=True, kw_only=True, slots=True)
class BackboneConfig:
    """What a decoder looks like; weights.read_config fills it from the model's own files."""

    family: str  # as the file says: "mistral" or "llama"
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
    window: int | None = None  # keys a query sees, itself included; None = all before it
    max_positions: int
    causal: bool = True

    def __post_init__(self) -> None:
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads must be a multiple of n_kv_heads: got {self.n_heads} and {self.n_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary positions: got {self.head_dim}")
        if self.rope_divisors is not None and len(self.rope_divisors) != self.head_dim // 2:
            raise ValueError(f"rope_divisors must hold {self.head_dim // 2} numbers: got {len(self.rope_divisors)}")


class Rotary(NamedTuple):
    """Cosines and sines of every packed token's position, both (T, 1, head_dim / 2), fp32 or fp64."""

    cos: Tensor
    sin: Tensor


class RMSNorm(nn.Module):
    """x / rms(x) * weight, the mean square in max(fp32, x's dtype) (arXiv 1910.07467)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim), requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return F.rms_norm(wide, (x.shape[-1],), self.weight.to(wide.dtype), self.eps).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        q_dim, kv_dim = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.wq = frozen_linear(config.dim, q_dim)
        self.wk = frozen_linear(config.dim, kv_dim)
        self.wv = frozen_linear(config.dim, kv_dim)
        self.wo = frozen_linear(q_dim, config.dim)

    def forward(self, x: Tensor, rotary: Rotary, cu_seqlens: Tensor) -> Tensor:
        q, k, v = (
            w(x).unflatten(-1, (-1, self.config.head_dim)) for w in (self.wq, self.wk, self.wv)
        )  # (T, H or K, hd)
        out = varlen_attention(
            rotate(q, rotary),
            rotate(k, rotary),
            v,
            cu_seqlens,
            scale=self.config.head_dim**-0.5,
            window=self.config.window,
            causal=self.config.causal,
        )
        return self.wo(out.flatten(1))  # (T, D)


class FeedForward(nn.Module):
    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.w_gate = frozen_linear(config.dim, config.hidden_dim)
        self.w_up = frozen_linear(config.dim, config.hidden_dim)
        self.w_down = frozen_linear(config.hidden_dim, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.w_down(F.silu(self.w_gate(x)) * self.w_up(x))


class Block(nn.Module):
    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(self, x: Tensor, rotary: Rotary, cu_seqlens: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotary, cu_seqlens)
        return x + self.feed_forward(self.ffn_norm(x))


class Backbone(nn.Module):
    """The decoder without a language-model head; its parameters are uninitialised until weights.load_weights."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.tok_embeddings.weight.requires_grad_(False)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)

    def forward(self, tokens: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Run the decoder over packed sequences.

        tokens: (T,) int64.  cu_seqlens: (N+1,) int32.  Returns (T, D) in the weights' dtype, before the final norm
        (`backbone.norm`), which last-token pooling needs on N rows only.
        """
        x = self.tok_embeddings(tokens)  # (T, D)
        rotary = rotary_of(positions_of(cu_seqlens, tokens.shape[0]), self.config, x.dtype)
        for layer in self.layers:
            x = layer(x, rotary, cu_seqlens)
        return x


def frozen_linear(in_features: int, out_features: int) -> nn.Linear:
    """Make a linear without bias whose weight takes no gradient and is not initialised (it will be loaded)."""
    linear = nn.utils.skip_init(nn.Linear, in_features, out_features, bias=False, device=torch.get_default_device())
    linear.weight.requires_grad_(False)
    return linear


def positions_of(cu_seqlens: Tensor, n_tokens: int) -> Tensor:
    """Number the tokens of every sequence from 0.  cu_seqlens: (N+1,) int32.  Returns (T,) int64."""
    starts = cu_seqlens[:-1].long().repeat_interleave(cu_seqlens.diff(), output_size=n_tokens)
    return torch.arange(n_tokens, device=cu_seqlens.device) - starts


def rotary_of(positions: Tensor, config: BackboneConfig, dtype: torch.dtype) -> Rotary:
    """Compute the rotary angles of the given positions (arXiv 2104.09864), in max(fp32, dtype).

    positions: (T,) int64.  Returns two (T, 1, head_dim / 2).
    """
    wide = torch.promote_types(dtype, torch.float32)
    exponents = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=wide) / config.head_dim
    frequencies = config.rope_theta**-exponents
    if config.rope_divisors is not None:
        frequencies = frequencies / torch.tensor(config.rope_divisors, device=positions.device, dtype=wide)
    angles = positions.to(wide)[:, None, None] * frequencies  # (T, 1, head_dim / 2)
    return Rotary(angles.cos(), angles.sin())


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Turn the pairs (i, i + head_dim / 2) of every head by its token's angles.  x: (T, heads, head_dim)."""
    first, second = x.to(rotary.cos.dtype).chunk(2, dim=-1)
    turned = (first * rotary.cos - second * rotary.sin, second * rotary.cos + first * rotary.sin)
    return torch.cat(turned, dim=-1).to(x.dtype)
