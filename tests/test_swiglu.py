"""Gated activations equal their formulas over all that a gate may hold, in every face."""

import math
from collections.abc import Callable

import pytest
import torch
from faces import BUILT, DTYPES, assert_faces_agree, assert_spare_is_left, assert_threads_do_not_matter, with_gradients
from tolerances import assert_fp64
from torch import Tensor

from e5kernels.swiglu import geglu, geglu_reference, swiglu, swiglu_reference

Gated = Callable[[Tensor, Tensor], Tensor]
PAIRS = [(swiglu, swiglu_reference), (geglu, geglu_reference)]
FACES = [swiglu_reference, geglu_reference, *(pytest.param(f, marks=BUILT) for f in (swiglu, geglu))]


def gate_of(function: Gated, x: float) -> float:
    """The activation by Python floats."""
    if function in (swiglu, swiglu_reference):
        return x / (1 + math.exp(-x)) if x > -700 else 0.0
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize("function", FACES)
def test_the_gate_is_the_definition(function: Gated) -> None:
    gate, up = torch.linspace(-30, 30, 1001, dtype=torch.float64), torch.randn(1001, dtype=torch.float64)
    expected = torch.tensor([gate_of(function, x) for x in gate.tolist()], dtype=torch.float64) * up
    assert_fp64(function(gate, up), expected)


@pytest.mark.parametrize("function", FACES)
def test_spare_columns_are_left_alone(function: Gated) -> None:
    inputs = [torch.randn(3, 7, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert_spare_is_left(lambda spare: function(*inputs, spare), inputs)


@pytest.mark.parametrize("function", FACES)
def test_the_gradient_is_right(function: Gated) -> None:
    gate = torch.tensor([-8.0, -1.3, -0.01, 0.0, 0.7, 2.0, 9.0], dtype=torch.float64, requires_grad=True)
    up = torch.randn(7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (gate, up))


@BUILT
@pytest.mark.parametrize(("function", "reference"), PAIRS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 1), (3, 7), (2, 3, 77), (3, 576), (5,), (0, 7), (2, 0)])
def test_faces_agree(function: Gated, reference: Gated, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = [3 * torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)]
    assert_faces_agree("glu", function, reference, inputs)


@BUILT
@pytest.mark.parametrize(("function", "reference"), PAIRS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_layout_is_read_rightly(function: Gated, reference: Gated, dtype: torch.dtype) -> None:
    packed = torch.randn(6, 14).to(dtype)
    for inputs in (packed.split(7, dim=1), packed.T.split(7), (packed[:, :7], packed[:1, 7:].expand(6, 7))):
        assert not any(x.is_contiguous() for x in inputs) or inputs[0].shape[0] == 7
        assert_faces_agree("glu", function, reference, inputs)


@BUILT
@pytest.mark.parametrize(("function", "reference"), PAIRS)
def test_a_gradient_that_is_not_contiguous_is_read_rightly(function: Gated, reference: Gated) -> None:
    inputs, upstream = torch.randn(2, 5, 7).double().unbind(), torch.randn(7, 5).double().T
    pairs = zip(*(with_gradients(f, inputs, upstream) for f in (function, reference)), strict=True)
    for ours, theirs in pairs:
        assert_fp64(ours, theirs)


@BUILT
@pytest.mark.parametrize(("function", "reference"), PAIRS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_gates_reach_their_limits(function: Gated, reference: Gated, dtype: torch.dtype) -> None:
    gate = torch.tensor([1e4, -1e4, 1e4, -1e4, 88.5, -88.5, 200.0, -200.0, 0.0, -0.0]).to(dtype)
    up = torch.tensor([1.0, 1.0, -2.0, -2.0, 1.0, 1.0, 1.0, 1.0, 1e4, 1e4]).to(dtype)
    out, d_gate, d_up = with_gradients(function, (gate, up), torch.ones_like(gate))
    passing = gate > 0
    for got, limit in ((out, gate * up), (d_gate, up), (d_up, gate)):
        torch.testing.assert_close(got[passing], limit[passing], rtol=1e-6, atol=0.0)
        torch.testing.assert_close(got[~passing][:4], torch.zeros(4, dtype=dtype), rtol=0.0, atol=1e-35)
    assert d_gate[-2:].tolist() == (up[-2:] / 2).tolist() and not d_up[-2:].any() and not out[-2:].any()
    huge = torch.tensor([3e38, -3e38]).to(dtype)
    assert torch.equal(function(huge, torch.ones_like(huge)), torch.stack([huge[0], torch.zeros_like(huge[0])]))


@BUILT
@pytest.mark.parametrize("function", [swiglu, geglu])
def test_bfloat16_is_rounded_to_the_nearest_and_half_way_to_even(function: Gated) -> None:
    gate, up = (128 + 128 * torch.rand(2, 4096)).bfloat16()  # open gates: the product of two significands, many halves
    assert torch.equal(function(gate, -up), (gate.double() * -up.double()).bfloat16())
    huge = torch.full((40,), 3e38).bfloat16()
    assert (function(huge, huge) == math.inf).all()


@BUILT
@pytest.mark.parametrize("function", [swiglu, geglu])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", [0, 33])
def test_nan_stays_nan(function: Gated, dtype: torch.dtype, place: int) -> None:
    for broken in range(2):
        inputs = [torch.ones(40).to(dtype), torch.ones(40).to(dtype)]
        inputs[broken][place] = float("nan")
        for got in with_gradients(function, inputs, torch.ones_like(inputs[0]))[: 2 + (broken == 0)]:
            assert got[place].isnan() and not torch.cat([got[:place], got[place + 1 :]]).isnan().any()


@BUILT
def test_the_exponential_is_exact_to_four_ulp_and_vanishes_below_it() -> None:
    gate = torch.linspace(-100, 100, 400_001)
    x = gate.double()
    got, expected = swiglu(gate, torch.ones_like(gate)).double(), x / (1 + (-x).exp())
    vanishing = x < -87.3
    assert ((got - expected).abs() / expected.abs())[~vanishing & (x != 0)].max() < 4 * 2**-24
    assert (got - expected).abs()[vanishing].max() < 1.2e-36


@BUILT
@pytest.mark.parametrize("function", [swiglu, geglu])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_threads(function: Gated, dtype: torch.dtype) -> None:
    assert_threads_do_not_matter(function, [torch.randn(1001, 57).to(dtype), torch.randn(1001, 57).to(dtype)])


@BUILT
@pytest.mark.parametrize(("function", "reference"), PAIRS)
def test_float16_goes_the_reference_s_way(function: Gated, reference: Gated) -> None:
    gate, up = torch.randn(2, 3, 7).half()
    assert torch.equal(function(gate, up), reference(gate, up))


X = torch.ones(4, 6)


@BUILT
@pytest.mark.parametrize("bad", [X[:3], torch.ones(6, 4), torch.ones(24), X.double(), torch.ones(6, 4).T])
def test_raw_ops_refuse_what_they_cannot_read(bad: Tensor) -> None:
    ops = torch.ops.e5kernels
    for arguments in ((bad, X), (X, bad)):
        with pytest.raises(RuntimeError):
            ops.glu_forward(*arguments, False)
    for arguments in ((bad, X, X), (X, bad, X), (X, X, bad)):
        with pytest.raises(RuntimeError):
            ops.glu_backward(*arguments, False)
    with pytest.raises(RuntimeError):
        ops.glu_forward(X.half(), X.half(), False)


@BUILT
@pytest.mark.parametrize("gelu", [False, True])
def test_ops_are_registered_soundly(gelu: bool) -> None:
    gate, up = (torch.randn(3, 7, requires_grad=True) for _ in range(2))
    torch.library.opcheck(torch.ops.e5kernels.glu_forward.default, (gate, up, gelu))
    arguments = torch.randn(3, 7), gate.detach(), up.detach(), gelu
    torch.library.opcheck(torch.ops.e5kernels.glu_backward.default, arguments)
