"""Attention over packed sequences: softmax(scale * q k^T) v inside each sequence, never across two.

Boundaries come from cu_seqlens alone (lengths 1, 1, n are ordinary). Query i of a sequence sees the keys j <= i; with a
window W it sees the last W of them, itself among them (Hugging Face's `sliding_window`, arXiv 2310.06825 section 2);
without `causal` it sees both directions. Keys may have bounds of their own: a sequence's queries are then its last
tokens. Grouped queries: H query heads share K key heads, H a multiple of K.

q: (Tq, H, head_dim).  k, v: (Tk, K, head_dim).  Any float dtype; scores and sums in max(fp32, dtype) but in the
reference, which float16 takes on every device.
FLOPs, for P pairs of query and key that see each other: forward 4 P H head_dim, backward 10 P H head_dim.
Bytes, of e each element: forward 2 (Tq H + Tk K) head_dim e, backward twice that; no score is ever in memory.
Source: online softmax of arXiv 2205.14135.
"""

import sys

import torch
import torch.nn.functional as F
from torch import Tensor

from e5kernels import native

if sys.platform == "linux":  # Triton is published for no other
    from e5kernels.attention_triton import varlen_attention_triton


def varlen_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    scale: float,
    window: int | None = None,
    causal: bool = True,
    cu_seqlens_k: Tensor | None = None,
    spare: int = 0,
) -> Tensor:
    """Attend within every packed sequence by one scaled_dot_product_attention call each; the definition.

    Arguments and result as `varlen_attention`; spare columns are 0.
    """
    q_lengths = cu_seqlens.diff().tolist()
    k_lengths = q_lengths if cu_seqlens_k is None else cu_seqlens_k.diff().tolist()
    rows = [q.transpose(0, 1).split(q_lengths, dim=1)] + [x.transpose(0, 1).split(k_lengths, dim=1) for x in (k, v)]
    pieces = [q[:0]]  # what no sequence at all gives
    for q_n, k_n, v_n in zip(*rows, strict=True):
        mask = _seen(q_n.shape[1], k_n.shape[1], window, causal, q.device)
        out = F.scaled_dot_product_attention(
            q_n[None], k_n[None], v_n[None], attn_mask=mask, is_causal=causal and mask is None, scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )  # (1, H, length, head_dim)  # fmt: skip
        pieces.append(out[0].transpose(0, 1))
    out = torch.cat(pieces)
    return F.pad(out.flatten(1), (0, spare)) if spare else out


def _seen(n_queries: int, n_keys: int, window: int | None, causal: bool, device: torch.device) -> Tensor | None:
    """Return (n_queries, n_keys) bool, or None where the causal triangle or everything is seen."""
    if n_queries == n_keys and (window is None or window >= n_keys):
        return None
    position = torch.arange(n_keys - n_queries, n_keys, device=device)
    distance = position[:, None] - torch.arange(n_keys, device=device)
    seen = distance.abs() < window if window is not None else torch.ones_like(distance, dtype=torch.bool)
    return seen & (distance >= 0) if causal else seen


def face(device: torch.device) -> str:
    """Name the face of `varlen_attention` on a device: "triton" on CUDA under Linux, else as `native.face`."""
    return "triton" if device.type == "cuda" and sys.platform == "linux" else native.face(device)


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    scale: float,
    window: int | None = None,
    causal: bool = True,
    cu_seqlens_k: Tensor | None = None,
    spare: int = 0,
) -> Tensor:
    """Attend within every packed sequence.

    q: (Tq, H, head_dim).  k, v: (Tk, K, head_dim), K divides H.  cu_seqlens: (N+1,) int32, from 0 to Tq, not falling.
    window: keys that a query sees to its left, itself included (and as many to its right where not causal).
    cu_seqlens_k: bounds of k and v where they differ, no sequence shorter in keys than in queries.
    spare: columns for others behind every row of heads.
    Returns (Tq, H, head_dim), q's dtype, or (Tq, H head_dim + spare), of which the last columns hold anything.
    Raises ValueError on shapes that do not fit.
    """
    _check(q, k, v, cu_seqlens, cu_seqlens if cu_seqlens_k is None else cu_seqlens_k, window)
    chosen = face(q.device) if native.takes(q) else "reference"
    if chosen != "c++":
        function = varlen_attention_triton if chosen == "triton" else varlen_attention_reference
        bounds = {"cu_seqlens": cu_seqlens, "cu_seqlens_k": cu_seqlens_k}
        return function(q, k, v, **bounds, scale=scale, window=window, causal=causal, spare=spare)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    bounds = cu_seqlens.contiguous()
    bounds_k = bounds if cu_seqlens_k is None else cu_seqlens_k.contiguous()
    out, _ = torch.ops.e5kernels.varlen_attention_forward(q, k, v, bounds, bounds_k, scale, window or 0, causal)
    return F.pad(out.flatten(1), (0, spare)) if spare else out


def _check(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, window: int | None) -> None:
    if q.ndim != 3 or k.ndim != 3 or k.shape != v.shape or q.shape[2] != k.shape[2]:
        raise ValueError(
            f"q must be (Tq, H, head_dim), k and v (Tk, K, head_dim): got {tuple(q.shape)}, {tuple(k.shape)}, "
            f"{tuple(v.shape)}"
        )
    if not k.shape[1] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"the number of query heads must be a multiple of the key heads: got {q.shape[1]}, {k.shape[1]}"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must have one dtype: got {q.dtype}, {k.dtype}, {v.dtype}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, the token itself: got {window}")
    for name, bounds, n_tokens in (("cu_seqlens", cu_q, q.shape[0]), ("cu_seqlens_k", cu_k, k.shape[0])):
        if bounds.ndim != 1 or bounds.dtype != torch.int32 or bounds.numel() != cu_q.numel() or not bounds.numel():
            raise ValueError(f"{name} must be (N+1,) int32: got {tuple(bounds.shape)} {bounds.dtype}")
        if q.device.type == "cpu" and (bounds[0] != 0 or bounds[-1] != n_tokens or (bounds.diff() < 0).any()):
            raise ValueError(f"{name} must rise from 0 to {n_tokens}: got {bounds.tolist()[:8]}")
    if q.device.type == "cpu" and cu_q is not cu_k and (cu_k.diff() < cu_q.diff()).any():
        raise ValueError("a sequence must have at least as many keys as queries")


def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, scale: float, window: int, causal: bool
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(q.shape[:2], dtype=wide)


def _backward_fake(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_q: Tensor, cu_k: Tensor, scale: float,
    window: int, causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_q, cu_k, *ctx.settings = inputs
    ctx.save_for_backward(q, k, v, *output, cu_q, cu_k)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: torch.autograd.function.FunctionCtx, d_out: Tensor, _: Tensor) -> tuple:
    saved = ctx.saved_tensors
    gradients = torch.ops.e5kernels.varlen_attention_backward(d_out.contiguous(), *saved, *ctx.settings)
    return *gradients, None, None, None, None, None


if native.AVAILABLE:
    torch.library.register_fake("e5kernels::varlen_attention_forward", _forward_fake)
    torch.library.register_fake("e5kernels::varlen_attention_backward", _backward_fake)
    torch.library.register_autograd("e5kernels::varlen_attention_forward", _backward, setup_context=_setup_context)
