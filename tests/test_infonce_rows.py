"""Laws of InfoNCE by full rows in blocks: what the reference says, in a block's memory. test_infonce.py has more."""

import weakref
from collections.abc import Callable

import pytest
import torch
from test_infonce import ROWS, Face, gradients, messy_relations, plain_relations, unit_rows
from tolerances import assert_fp64, assert_twice
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from e5kernels.infonce import BLOCK_EXTRA, infonce_reference, infonce_rows, infonce_triton, rows_suit


@pytest.mark.parametrize("relations", [plain_relations, messy_relations])
@pytest.mark.parametrize("margin", [None, 0.05])
@pytest.mark.parametrize(("n_queries", "n_candidates", "dim"), [(1, 1, 8), (9, 5, 2), (23, 60, 24)])
@pytest.mark.parametrize("block_bytes", [1, 8 * 60 * 5, 2**26])
def test_row_blocks_equal_the_reference_in_float64(
    n_queries: int, n_candidates: int, dim: int, margin: float | None, relations: Callable, block_bytes: int
) -> None:
    r = relations(n_queries, n_candidates).to(torch.device("cpu"))
    queries, candidates = (unit_rows(n, dim, torch.float64).cpu().requires_grad_() for n in (n_queries, n_candidates))
    expected = infonce_reference(queries, candidates, r, temperature=0.02, margin=margin)
    out = infonce_rows(queries, candidates, r, temperature=0.02, margin=margin, block_bytes=block_bytes)
    assert_fp64(out.loss, expected.loss)
    assert_fp64(out.lse, expected.lse)
    assert torch.equal(out.accuracy, expected.accuracy) and torch.equal(out.negatives, expected.negatives)
    got, want = (torch.autograd.grad(3 * x.loss, (queries, candidates)) for x in (out, expected))
    for ours, theirs in zip(got, want, strict=True):
        assert_fp64(ours, theirs)


def test_row_blocks_in_bf16_err_at_most_twice_as_much_as_torch() -> None:
    relations = messy_relations(20, 60)
    queries, candidates = unit_rows(20, 576, torch.bfloat16), unit_rows(60, 576, torch.bfloat16)
    results = []
    for function, dtype in (
        (ROWS, torch.bfloat16),
        (infonce_reference, torch.bfloat16),
        (infonce_reference, torch.float32),
    ):
        inputs = queries.to(dtype).requires_grad_(), candidates.to(dtype).requires_grad_()
        out = function(*inputs, relations, temperature=0.02)
        results.append([out.loss.detach(), out.lse, *gradients(out, *inputs)])
    for got, same_dtype, fp32 in zip(*results, strict=True):
        assert got.dtype == same_dtype.dtype
        assert_twice(got, same_dtype, fp32)


class LiveBytes(TorchDispatchMode):
    """Follows the storages that ops make, and the most bytes of them that live at once."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.data_ptr() not in self.sizes:
                storage = tensor.untyped_storage()
                key = storage.data_ptr()
                if key not in self.sizes:
                    self.sizes[key] = storage.nbytes()
                    weakref.finalize(storage, self.sizes.pop, key, None)
        self.peak = max(self.peak, sum(self.sizes.values()))
        return out


@pytest.mark.parametrize("n_queries", [256, 1024])
def test_row_blocks_take_no_more_memory_than_the_block_allows(n_queries: int) -> None:
    n_candidates, dim, block_bytes = 2048, 8, 2**18
    relations = messy_relations(n_queries, n_candidates)
    queries, candidates = unit_rows(n_queries, dim).requires_grad_(), unit_rows(n_candidates, dim).requires_grad_()
    with LiveBytes() as live:
        out = infonce_rows(queries, candidates, relations, temperature=0.02, block_bytes=block_bytes)
    gradients_bytes = 4 * dim * (n_queries + n_candidates)
    assert live.peak >= block_bytes  # what is followed is the real thing
    assert live.peak <= (1 + BLOCK_EXTRA) * block_bytes + gradients_bytes + 64 * n_queries
    assert out.loss.requires_grad


def test_rows_or_tiles_is_decided_by_the_rows_that_a_block_holds() -> None:
    assert rows_suit(1) and rows_suit(16_384) and rows_suit(131_072) and not rows_suit(2**20)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("function", [infonce_triton, infonce_rows, ROWS])
@pytest.mark.parametrize(("n_queries", "n_candidates"), [(1, 1), (1, 4099), (1031, 2053)])
def test_both_ways_err_at_most_twice_as_much_as_torch_at_mistral_s_width_on_the_gpu(
    n_queries: int, n_candidates: int, function: Face, dtype: torch.dtype
) -> None:
    relations, results = messy_relations(n_queries, n_candidates), []
    rows = unit_rows(n_queries, 4096, dtype), unit_rows(n_candidates, 4096, dtype)
    faces = (function, dtype), (infonce_reference, dtype), (infonce_reference, torch.float64)
    for face_of, computed in faces:
        inputs = [x.to(computed).requires_grad_() for x in rows]
        out = face_of(*inputs, relations, temperature=0.02)
        results.append([out.loss.detach(), out.lse, *gradients(out, *inputs)])
    for got, same_dtype, truth in zip(*results, strict=True):
        assert_twice(got, same_dtype, truth.float())
