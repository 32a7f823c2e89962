"""Time packed attention against one scaled_dot_product_attention call a sequence: python -m bench.attention.

See bench/op.py. Shapes: a micro-batch of W64's lengths and sequences of 2,048 with Mistral-7B's heads; or with
SmolLM2's the quickstart's (48 texts of 10 to 64 tokens), documents of 128 tokens, and sequences of 2,048. FLOPs are
those of the pairs that see each other: 4 H head_dim a pair forward, 10 backward. On CUDA in bf16 torch's own packed
attention (flash; torch.nn.attention.varlen) is timed beside, its key heads laid out anew for every query head.
"""

import sys
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from bench.op import Case, Function, Settings, Work, run
from bench.workloads import bounds_of, packed_lengths
from e5kernels.attention import face, varlen_attention, varlen_attention_reference

QUICKSTART = {"quickstart": [10 + (17 * i) % 55 for i in range(48)], "documents": [128] * 16, "long": [2048] * 2}
TINY = {"tiny": [1, 9, 1, 30]}


def cases(s: Settings) -> Iterator[Case]:
    """Yield every shape; q, k and v are views of one packed projection."""
    shapes = {"135m": QUICKSTART, "tiny": TINY}.get(s.size)
    if shapes is None:
        shapes = {f"W64, {n} tokens": packed_lengths(n) for n in s.n_tokens} | {"long": [2048] * 4}
    c, scale = s.config, s.config.head_dim**-0.5
    for name, lengths in shapes.items():
        packed = s.randn(sum(lengths), c.n_heads + 2 * c.n_kv_heads, c.head_dim)
        inputs = packed.split([c.n_heads, c.n_kv_heads, c.n_kv_heads], dim=1)
        bounds, pairs = bounds_of(lengths, s.device), sum(n * (n + 1) // 2 for n in lengths)
        moved = 2 * sum(lengths) * (c.n_heads + c.n_kv_heads) * c.head_dim * packed.itemsize
        settings = {"scale": scale, "window": c.window}
        yield Case(
            shape=f"{name}: {len(lengths)} sequences, {c.n_heads} x {c.head_dim}",
            inputs=inputs,
            reference=lambda q, k, v, b=bounds, w=settings: varlen_attention_reference(q, k, v, b, **w),
            ours={face(s.device): lambda q, k, v, b=bounds, w=settings: varlen_attention(q, k, v, b, **w)},
            unchecked=_flash(bounds, max(lengths), scale) if packed.is_cuda and s.dtype == torch.bfloat16 else {},
            forward=Work(moved, 4.0 * pairs * c.n_heads * c.head_dim),
            backward=Work(2 * moved, 10.0 * pairs * c.n_heads * c.head_dim),
            not_compiled="a call a sequence: it would be compiled anew for every length",
        )


def _flash(bounds: Tensor, longest: int, scale: float) -> dict[str, Function]:
    """Return torch's packed attention; the window is longer than every text here, so it sees what ours does."""

    def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        return varlen_attn(q.contiguous(), k, v, bounds, bounds, longest, longest, scale=scale, window_size=(-1, 0))

    return {"torch varlen_attn": flash}


if __name__ == "__main__":
    sys.exit(run("attention", cases))
