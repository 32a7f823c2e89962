"""Triton face of `last_token`: its kernels, and the ops that launch them and tell autograd of each other.

What is computed and at what cost in bytes stands in last_token.py. The ops check nothing.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_D = 1024  # a row of a 4,096-wide model is four programs: enough of them even for one sequence


@triton.jit
def _last_row(cu_seqlens_ptr, sequence, n_sequences, n_tokens, dim):
    """Row of a sequence's last token, and its width: dim, or 0 where the bounds are unlawful."""
    start = tl.load(cu_seqlens_ptr + sequence)
    end = tl.load(cu_seqlens_ptr + sequence + 1)
    lawful = (start >= 0) & (start < end) & (end <= n_tokens)
    lawful &= (sequence != 0) | (start == 0)
    lawful &= (sequence != n_sequences - 1) | (end == n_tokens)
    return end.to(tl.int64) - 1, tl.where(lawful, dim, 0)


@triton.jit(do_not_specialize=["n_sequences", "n_tokens"])
def _last_token_forward_kernel(
    hidden_ptr, cu_seqlens_ptr, pooled_ptr, n_sequences, n_tokens, dim, BLOCK_D: tl.constexpr
):
    sequence = tl.program_id(0).to(tl.int64)
    row, width = _last_row(cu_seqlens_ptr, sequence, n_sequences, n_tokens, dim)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    # Unlawful bounds on a GPU would cost a synchronisation to report here: they give NaN, at which the step stops.
    values = tl.load(hidden_ptr + row * dim + columns, mask=columns < width, other=float("nan"))
    tl.store(pooled_ptr + sequence * dim + columns, values, mask=columns < dim)


@triton.jit(do_not_specialize=["n_sequences", "n_tokens"])
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
