"""Attention over packed sequences: softmax(scale * q k^T) v inside each sequence, never across two.

Boundaries come from cu_seqlens alone (lengths 1, 1, n are ordinary). Query i of a sequence sees the keys j <= i; with a
window W it sees the last W of them, itself among them (Hugging Face's `sliding_window`, arXiv 2310.06825 section 2);
without `causal` it sees both directions. Grouped queries: H query heads share K key heads, H a multiple of K.

One scaled_dot_product_attention call a sequence, on any device and in any dtype: the definition that faster faces are
held against.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    scale: float,
    window: int | None = None,
    causal: bool = True,
) -> Tensor:
    """Attend within every packed sequence.

    q: (T, H, head_dim).  k, v: (T, K, head_dim), K divides H.  cu_seqlens: (N+1,) int32, rising, cu_seqlens[-1] == T.
    window: keys that a query sees to its left, itself included (and as many to its right where not causal).
    Returns (T, H, head_dim), q's dtype.  Raises ValueError on shapes that do not fit.
    """
    if q.shape[1] % k.shape[1]:
        raise ValueError(
            f"the number of query heads must be a multiple of the key heads: got {q.shape[1]}, {k.shape[1]}"
        )
    lengths = cu_seqlens.diff().tolist()
    if sum(lengths) != q.shape[0]:
        raise ValueError(f"cu_seqlens must end at T: got {sum(lengths)} for {q.shape[0]} tokens")
    grouped = q.shape[1] != k.shape[1]
    pieces = []
    for q_n, k_n, v_n in zip(*(x.transpose(0, 1).split(lengths, dim=1) for x in (q, k, v)), strict=True):
        length = q_n.shape[1]
        mask = _window_mask(length, window, causal, q.device) if window is not None and window < length else None
        out = F.scaled_dot_product_attention(
            q_n[None], k_n[None], v_n[None], attn_mask=mask, is_causal=causal and mask is None, scale=scale,
            enable_gqa=grouped,
        )  # (1, H, length, head_dim)  # fmt: skip
        pieces.append(out[0].transpose(0, 1))
    return torch.cat(pieces)


def _window_mask(length: int, window: int, causal: bool, device: torch.device) -> Tensor:
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    seen = distance.abs() < window
    return seen & (distance >= 0) if causal else seen


def face(device: torch.device) -> str:
    """Name the implementation that runs on this device, for the first log line."""
    return f"per-sequence sdpa on {device.type}"
