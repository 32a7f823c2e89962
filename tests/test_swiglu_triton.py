"""The gated activations' Triton face equals their references over all that a gate may hold, in any layout."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from faces import DEVICE, TRITON_DTYPES, Clones, assert_faces_agree, assert_spare_is_left, with_gradients
from tolerances import assert_fp32
from torch import Tensor

from e5kernels.swiglu import geglu_reference, swiglu_reference
from e5kernels.swiglu_triton import TILE, glu_triton

Gated = Callable[[Tensor, Tensor], Tensor]
BLOCK = TILE["BLOCK"]
PAIRS = [(partial(glu_triton, gelu=False), swiglu_reference), (partial(glu_triton, gelu=True), geglu_reference)]
agree = partial(assert_faces_agree, "glu", is_triton=True)


@pytest.mark.parametrize(("function", "reference"), PAIRS)
@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize("shape", [(3, 1), (2, 3, 77), (5,), (0, 7), (2, 0), (BLOCK - 1,), (1, BLOCK), (2, BLOCK + 1)])
def test_triton_equals_reference(function: Gated, reference: Gated, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = [3 * torch.randn(shape).to(DEVICE, dtype), torch.randn(shape).to(DEVICE, dtype)]
    agree(function, reference, inputs)


@pytest.mark.parametrize(("function", "reference"), PAIRS)
@pytest.mark.parametrize("dtype", TRITON_DTYPES)
def test_halves_of_a_packed_projection_are_read_where_they_lie(
    function: Gated, reference: Gated, dtype: torch.dtype
) -> None:
    packed = torch.randn(3, 14).to(DEVICE, dtype)
    for inputs in (packed.split(7, dim=1), (packed[:, :7], packed[:1, 7:].expand(3, 7)), packed[:, 1:].split(7)):
        with torch.no_grad(), Clones() as clones:
            function(inputs[0], inputs[-1])
        assert clones.n == 0
        agree(function, reference, [inputs[0], inputs[-1]])


@pytest.mark.parametrize(("function", "reference"), PAIRS)
@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize("shape", [(3, 1), (5, 77), (2, BLOCK + 1), (0, 7)])
def test_spare_columns_are_left_alone(
    function: Gated, reference: Gated, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    inputs = [torch.randn(shape).to(DEVICE, dtype).requires_grad_() for _ in range(2)]
    for f in (function, reference):
        assert_spare_is_left(lambda spare, f=f: f(*inputs, spare=spare), inputs)


@pytest.mark.parametrize(("function", "reference"), PAIRS)
def test_every_other_layout_is_read_rightly(function: Gated, reference: Gated) -> None:
    packed = torch.randn(4, 2, 14, device=DEVICE)
    for x in (packed[..., ::2], packed.transpose(0, 2), packed[:, 0].T, packed[0, 0, ::2]):
        agree(function, reference, [x, x.flip(0)])


@pytest.mark.parametrize(("function", "reference"), PAIRS)
def test_a_gradient_that_is_not_contiguous_is_read_rightly(function: Gated, reference: Gated) -> None:
    inputs, upstream = torch.randn(2, 5, 7, device=DEVICE).unbind(), torch.randn(7, 5, device=DEVICE).T
    pairs = zip(*(with_gradients(f, inputs, upstream) for f in (function, reference)), strict=True)
    for ours, theirs in pairs:
        assert_fp32("glu", ours, theirs)


@pytest.mark.filterwarnings("ignore:overflow")  # numpy's, where the interpreter's exp is inf as it must be
@pytest.mark.parametrize(("function", "reference"), PAIRS)
def test_extreme_gates_reach_their_limits(function: Gated, reference: Gated) -> None:
    gate = torch.tensor([1e4, -1e4, 1e4, -1e4, 88.5, -88.5, 200.0, -200.0, 0.0, -0.0], device=DEVICE)
    up = torch.tensor([1.0, 1.0, -2.0, -2.0, 1.0, 1.0, 1.0, 1.0, 1e4, 1e4], device=DEVICE)
    out, d_gate, d_up = with_gradients(function, (gate, up), torch.ones_like(gate))
    passing = gate > 0
    for got, limit in ((out, gate * up), (d_gate, up), (d_up, gate)):
        torch.testing.assert_close(got[passing], limit[passing], rtol=1e-6, atol=0.0)
        torch.testing.assert_close(got[~passing][:4], torch.zeros(4, device=DEVICE), rtol=0.0, atol=1e-35)
    assert d_gate[-2:].tolist() == (up[-2:] / 2).tolist() and not d_up[-2:].any() and not out[-2:].any()
    huge = torch.tensor([3e38, -3e38], device=DEVICE)
    assert torch.equal(function(huge, torch.ones_like(huge)), torch.stack([huge[0], torch.zeros_like(huge[0])]))


@pytest.mark.parametrize(("function", "reference"), PAIRS)
def test_nan_stays_nan(function: Gated, reference: Gated) -> None:
    for broken in range(2):
        inputs = [torch.ones(40, device=DEVICE), torch.ones(40, device=DEVICE)]
        inputs[broken][33] = float("nan")
        for got in with_gradients(function, inputs, torch.ones_like(inputs[0]))[: 2 + (broken == 0)]:
            assert got.isnan().nonzero().flatten().tolist() == [33]


@pytest.mark.parametrize("bad", [torch.ones(3, 6), torch.ones(24), torch.ones(4, 6).double(), torch.ones(())])
def test_what_is_not_alike_is_refused(bad: Tensor) -> None:
    for inputs in ((bad, torch.ones(4, 6)), (torch.ones(4, 6), bad)):
        with pytest.raises(ValueError, match="gate and up must be"):
            glu_triton(*inputs, gelu=False)


@pytest.mark.gpu
@pytest.mark.parametrize(("function", "reference"), PAIRS)
@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize("n_tokens", [1, 1031])
def test_at_mistral_s_width_on_the_gpu(function: Gated, reference: Gated, n_tokens: int, dtype: torch.dtype) -> None:
    agree(function, reference, list(torch.randn(2, n_tokens, 14336, device=DEVICE).to(dtype).unbind()))
    agree(function, reference, list(torch.randn(n_tokens, 2 * 14336, device=DEVICE).to(dtype).chunk(2, dim=1)))
