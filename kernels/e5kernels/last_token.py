"""Last-token pooling of a packed batch: one row per sequence.

    forward   pooled[n] = hidden[cu_seqlens[n+1] - 1]
    backward  d_hidden  = 0, then d_hidden[cu_seqlens[n+1] - 1] = d_pooled[n]

hidden: (T, D) any float dtype.  cu_seqlens: (N+1,) int32, strictly rising from 0 to T.  pooled: (N, D), hidden's dtype.
Every row has one writer, so that the result is the same bits on every run.
Bytes moved, of e each element: forward 2 N D e; backward T D e to clear and 2 N D e to place.  FLOPs: none.
Source: last-token pooling of arXiv 2401.00368 section 3.1.
"""

import sys

import torch
from torch import Tensor

if sys.platform == "linux":  # Triton is published for no other
    from e5kernels.last_token_triton import last_token_forward


def last_token_reference(hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Gather the last row of every packed sequence; the definition.

    hidden: (T, D) any float dtype.  cu_seqlens: (N+1,) int32.  Returns (N, D), hidden's dtype.
    """
    return hidden.index_select(0, cu_seqlens[1:].long() - 1)


def face(device: torch.device) -> str:
    """Name the face that `last_token` uses on a device: "triton" on CUDA under Linux, else "reference"."""
    return "triton" if device.type == "cuda" and sys.platform == "linux" else "reference"


def last_token(hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Gather the last row of every packed sequence.

    hidden: (T, D) any float dtype.  cu_seqlens: (N+1,) int32, strictly rising from 0 to T, on hidden's device.
    Returns (N, D), hidden's dtype, differentiable in hidden; N may be 0.
    Raises ValueError on wrong shapes, dtypes or devices and, on the CPU, on an empty sequence or bounds that do not run
    from 0 to T; on CUDA, where reading them would stall the stream, such a sequence gets a row of NaN.
    """
    _check(hidden, cu_seqlens)
    if face(hidden.device) == "triton":
        return last_token_forward(hidden, cu_seqlens)
    return last_token_reference(hidden, cu_seqlens)


def _check(hidden: Tensor, cu_seqlens: Tensor) -> None:
    if hidden.ndim != 2 or not hidden.is_floating_point() or hidden.shape[1] == 0:
        raise ValueError(f"hidden must be (T, D) floats with D >= 1: got {tuple(hidden.shape)} {hidden.dtype}")
    if cu_seqlens.ndim != 1 or cu_seqlens.dtype != torch.int32 or cu_seqlens.numel() == 0:
        raise ValueError(f"cu_seqlens must be (N+1,) int32: got {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}")
    if cu_seqlens.device != hidden.device:
        raise ValueError(f"cu_seqlens must be on hidden's device: got {cu_seqlens.device} for {hidden.device}")
    if hidden.device.type != "cpu":
        return
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0:
        raise ValueError(f"cu_seqlens must start at 0: got {bounds[0]}")
    if bounds[-1] != hidden.shape[0]:
        raise ValueError(f"cu_seqlens must end at T: got {bounds[-1]} for {hidden.shape[0]} tokens")
    for n, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        if end <= start:
            raise ValueError(f"every sequence needs a token: sequence {n} has {end - start}, drop it before packing")
