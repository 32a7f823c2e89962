import pytest
import torch
from tolerances import assert_fp32
from torch import Tensor

from e5kernels.last_token import face, last_token, last_token_reference
from e5kernels.last_token_triton import last_token_backward, last_token_forward

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LENGTHS = [[1], [5], [1, 1, 7], [1] * 20, [3, 64, 1, 2]]


def bounds(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(DEVICE)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_reference_is_the_last_row_of_every_sequence(lengths: list[int], dtype: torch.dtype) -> None:
    hidden = torch.randn(sum(lengths), 9, device=DEVICE).to(dtype)
    expected = torch.stack([piece[-1] for piece in hidden.split(lengths)])
    pooled = last_token_reference(hidden, bounds(lengths))
    assert pooled.dtype == dtype and torch.equal(pooled, expected)


def test_reference_gradient_is_right() -> None:
    hidden = torch.randn(6, 3, dtype=torch.float64, device=DEVICE, requires_grad=True)
    assert torch.autograd.gradcheck(lambda h: last_token_reference(h, bounds([1, 3, 2])), (hidden,))


@pytest.mark.parametrize("dim", [1, 7, 576, 1023, 1024, 1025])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_triton_equals_reference(lengths: list[int], dim: int, dtype: torch.dtype) -> None:
    hidden = torch.randn(sum(lengths), dim, device=DEVICE).to(dtype).requires_grad_()
    weights = torch.randn(len(lengths), dim, device=DEVICE).to(dtype)
    expected = last_token_reference(hidden, bounds(lengths))
    pooled = last_token_forward(hidden, bounds(lengths))
    assert_fp32("last_token", pooled, expected)
    assert_fp32(
        "last_token", torch.autograd.grad(pooled, hidden, weights)[0], torch.autograd.grad(expected, hidden, weights)[0]
    )


def test_gradient_reaches_the_last_rows_only() -> None:
    hidden = torch.randn(9, 5, device=DEVICE, requires_grad=True)
    last_token_forward(hidden, bounds([1, 1, 7])).sum().backward()
    assert hidden.grad.sum(1).tolist() == [5.0, 5.0, 0, 0, 0, 0, 0, 0, 5.0]


def test_triton_reads_rows_that_are_not_contiguous() -> None:
    hidden = torch.randn(5, 12, device=DEVICE).T
    assert torch.equal(last_token_forward(hidden, bounds([4, 8])), hidden[[3, 11]])


def test_an_empty_micro_batch_pools_to_nothing() -> None:
    hidden = torch.randn(0, 5, device=DEVICE, requires_grad=True)
    for pooled in (last_token(hidden, bounds([])), last_token_forward(hidden, bounds([]))):
        assert pooled.shape == (0, 5)
        assert torch.autograd.grad(pooled.sum(), hidden)[0].shape == (0, 5)


@pytest.mark.parametrize("cu_seqlens", [[0, 2, 2, 4], [0, 3, 2, 4], [0, 2, 3], [0, 2, 5], [1, 2, 4]])
def test_unlawful_bounds_are_refused_on_the_cpu_and_poisoned_by_the_kernel(cu_seqlens: list[int]) -> None:
    hidden = torch.ones(4, 3)
    cu = torch.tensor(cu_seqlens, dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seqlens must|needs a token"):
        last_token(hidden, cu)
    assert last_token_forward(hidden.to(DEVICE), cu.to(DEVICE)).isnan().any()


@pytest.mark.parametrize(
    ("hidden", "cu_seqlens"),
    [
        (torch.ones(4, 3), torch.tensor([0, 4])),
        (torch.ones(4, 3, dtype=torch.int32), torch.tensor([0, 4], dtype=torch.int32)),
        (torch.ones(4), torch.tensor([0, 4], dtype=torch.int32)),
        (torch.ones(4, 3), torch.tensor([], dtype=torch.int32)),
        (torch.ones(4, 3), torch.tensor([[0, 4]], dtype=torch.int32)),
    ],
)
def test_wrong_shapes_and_dtypes_are_refused(hidden: Tensor, cu_seqlens: Tensor) -> None:
    with pytest.raises(ValueError, match="must be"):
        last_token(hidden, cu_seqlens)


def test_face_is_picked_by_device() -> None:
    assert face(torch.device("cpu")) == "reference"
    assert face(torch.device("cuda", 1)) == "triton"


def test_ops_are_registered_soundly() -> None:
    cu_seqlens = bounds([1, 4, 2])
    hidden = torch.randn(7, 5, device=DEVICE, requires_grad=True)
    torch.library.opcheck(last_token_forward, (hidden, cu_seqlens))
    torch.library.opcheck(last_token_backward, (torch.randn(3, 5, device=DEVICE), cu_seqlens, 7))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("lengths", [[1], [1] * 33, [1031, 1, 512, 333]])
def test_at_mistral_s_width_on_the_gpu(lengths: list[int], dtype: torch.dtype) -> None:
    test_triton_equals_reference(lengths, 4096, dtype)
