"""Last-token pooling of a packed batch: one row per sequence.

    forward   pooled[n] = hidden[cu_seqlens[n+1] - 1]
    backward  d_hidden  = 0, then d_hidden[cu_seqlens[n+1] - 1] = d_pooled[n]

hidden: (T, D) any float dtype.  cu_seqlens: (N+1,) int32, strictly rising from 0 to T.  pooled: (N, D), hidden's dtype.
Every row has one writer, so that the result is the same bits on every run.
Bytes moved, of e each element: forward 2 N D e; backward T D e to clear and 2 N D e to place.  FLOPs: none.
Source: last-token pooling of arXiv 2401.00368 section 3.1.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_D = 1024  # a row of a 4,096-wide model is four programs: enough of them even for one sequence


def last_token_reference(hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Gather the last row of every packed sequence; the definition.

    hidden: (T, D) any float dtype.  cu_seqlens: (N+1,) int32.  Returns (N, D), hidden's dtype.
    """
    return hidden.index_select(0, cu_seqlens[1:].long() - 1)


@triton.jit
def _last_row(cu_seqlens_ptr, sequence, n_sequences, n_tokens, dim):
    """Row of a sequence's last token, and its width: dim, or 0 where the bounds are unlawful."""
    start = tl.load(cu_seqlens_ptr + sequence)
    end = tl.load(cu_seqlens_ptr + sequence + 1)
    lawful = (start >= 0) & (start < end) & (end <= n_tokens)
    lawful &= (sequence != 0) | (start == 0)
    lawful &= (sequence != n_sequences - 1) | (end == n_tokens)
    return end.to(tl.int64) - 1, tl.where(lawful, dim, 0)


@triton.jit
def _last_token_forward_kernel(
    hidden_ptr, cu_seqlens_ptr, pooled_ptr, n_sequences, n_tokens, dim, BLOCK_D: tl.constexpr
):
    sequence = tl.program_id(0).to(tl.int64)
    row, width = _last_row(cu_seqlens_ptr, sequence, n_sequences, n_tokens, dim)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    # Unlawful bounds on a GPU would cost a synchronisation to report here: they give NaN, at which the step stops.
    values = tl.load(hidden_ptr + row * dim + columns, mask=columns < width, other=float("nan"))
    tl.store(pooled_ptr + sequence * dim + columns, values, mask=columns < dim)


@triton.jit
def _last_token_backward_kernel(
    d_pooled_ptr, cu_seqlens_ptr, d_hidden_ptr, n_sequences, n_tokens, dim, BLOCK_D: tl.constexpr
):
    sequence = tl.program_id(0).to(tl.int64)
    row, width = _last_row(cu_seqlens_ptr, sequence, n_sequences, n_tokens, dim)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    values = tl.load(d_pooled_ptr + sequence * dim + columns, mask=columns < dim)
    tl.store(d_hidden_ptr + row * dim + columns, values, mask=columns < width)


@torch.library.custom_op("e5kernels::last_token_forward", mutates_args=())
def last_token_forward(hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Run the forward kernel: (T, D), (N+1,) -> (N, D)."""
    n_sequences, (n_tokens, dim) = cu_seqlens.numel() - 1, hidden.shape
    pooled = hidden.new_empty(n_sequences, dim)
    if n_sequences:
        _last_token_forward_kernel[(n_sequences, triton.cdiv(dim, BLOCK_D))](
            hidden.contiguous(), cu_seqlens.contiguous(), pooled, n_sequences, n_tokens, dim, BLOCK_D=BLOCK_D
        )
    return pooled


@torch.library.custom_op("e5kernels::last_token_backward", mutates_args=())
def last_token_backward(d_pooled: Tensor, cu_seqlens: Tensor, n_tokens: int) -> Tensor:
    """Run the backward kernel: (N, D), (N+1,) -> (T, D)."""
    n_sequences, dim = d_pooled.shape
    d_hidden = d_pooled.new_zeros(n_tokens, dim)
    if n_sequences:
        _last_token_backward_kernel[(n_sequences, triton.cdiv(dim, BLOCK_D))](
            d_pooled.contiguous(), cu_seqlens.contiguous(), d_hidden, n_sequences, n_tokens, dim, BLOCK_D=BLOCK_D
        )
    return d_hidden


@last_token_forward.register_fake
def _(hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
    return hidden.new_empty(cu_seqlens.shape[0] - 1, hidden.shape[1])


@last_token_backward.register_fake
def _(d_pooled: Tensor, cu_seqlens: Tensor, n_tokens: int) -> Tensor:
    return d_pooled.new_empty(n_tokens, d_pooled.shape[1])


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    hidden, cu_seqlens = inputs
    ctx.save_for_backward(cu_seqlens)
    ctx.n_tokens = hidden.shape[0]


def _backward(ctx: torch.autograd.function.FunctionCtx, d_pooled: Tensor) -> tuple[Tensor, None]:
    return last_token_backward(d_pooled, ctx.saved_tensors[0], ctx.n_tokens), None


last_token_forward.register_autograd(_backward, setup_context=_setup_context)


def face(device: torch.device) -> str:
    """Name the face that `last_token` uses on a device: "triton" on CUDA, else "reference"."""
    return "triton" if device.type == "cuda" else "reference"


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
