"""RMSNorm is x / rms(x) * weight in every face, added to or not; its weight's gradient comes by the reference."""

import math
from functools import partial

import pytest
import torch
from faces import BUILT, DTYPES, assert_faces_agree, assert_threads_do_not_matter, wide, with_gradients
from tolerances import assert_fp64

from e5kernels.rms_norm import add_rms_norm, add_rms_norm_reference, rms_norm, rms_norm_reference

FACES = [rms_norm_reference, pytest.param(rms_norm, marks=BUILT)]
EPS = 1e-5


@pytest.mark.parametrize("function", FACES)
@pytest.mark.parametrize("shape", [(5, 1), (3, 7), (2, 3, 77), (9,), (0, 4), (2, 0, 4)])
def test_rms_norm_is_the_definition(function: type(rms_norm), shape: tuple[int, ...]) -> None:
    x, weight = torch.randn(shape, dtype=torch.float64), torch.randn(shape[-1], dtype=torch.float64)
    assert_fp64(function(x, weight, 0.3), x / ((x * x).mean(-1, keepdim=True) + 0.3).sqrt() * weight)


@pytest.mark.parametrize("function", FACES)
@pytest.mark.parametrize("width", [1, 7, 40])
def test_the_gradient_is_right(function: type(rms_norm), width: int) -> None:
    x = torch.randn(3, width, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(width, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: function(x, weight, 1e-2), (x,))
    assert torch.autograd.gradcheck(lambda x, w: function(x, w, 1e-2), (x, weight.requires_grad_()))


@pytest.mark.parametrize("function", [add_rms_norm_reference, add_rms_norm])
@pytest.mark.parametrize("has_added", [False, True])
def test_what_is_added_is_normalised_and_goes_on_as_the_residual(function: type(add_rms_norm), has_added: bool) -> None:
    x, other, weight = (torch.randn(shape, dtype=torch.float64) for shape in ((3, 7), (3, 7), (7,)))
    added = other if has_added else None
    h, y = function(x, added, weight, 0.3)
    assert torch.equal(h, x + other if has_added else x)
    assert torch.equal(y, (rms_norm_reference if function is add_rms_norm_reference else rms_norm)(h, weight, 0.3))
    leaves = (x.requires_grad_(), *([other.requires_grad_()] if has_added else []))
    assert torch.autograd.gradcheck(lambda x, added=None: function(x, added, weight, 0.3), leaves)
    h, wide = function(x, added, weight, 0.3, 16)
    assert h.shape == (3, 7) and wide.shape == (3, 23) and torch.equal(wide[:, :7], y)


@BUILT
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 7, 77, 576])
@pytest.mark.parametrize("wide_weight", [False, True])
def test_faces_agree(width: int, dtype: torch.dtype, wide_weight: bool) -> None:
    weight = torch.randn(width).to(wide(dtype) if wide_weight else dtype)
    for shape in ((6, width), (2, 3, width), (width,), (0, width)):
        functions = (lambda x, f=f: f(x, weight, EPS) for f in (rms_norm, rms_norm_reference))
        assert_faces_agree("rms_norm", *functions, [torch.randn(shape).to(dtype)])


@BUILT
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_layout_is_read_rightly(dtype: torch.dtype) -> None:
    weight = torch.randn(14).to(dtype)[::2]
    packed = torch.randn(6, 20).to(dtype)
    for x in (packed[:, 3:10], packed[:, :7].T.contiguous().T, packed[:1, :7].expand(6, 7)):
        assert not x.is_contiguous()
        functions = (lambda x, f=f: f(x, weight, EPS) for f in (rms_norm, rms_norm_reference))
        assert_faces_agree("rms_norm", *functions, [x])


@BUILT
def test_a_gradient_that_is_not_contiguous_is_read_rightly() -> None:
    x, weight, upstream = torch.randn(5, 7).double(), torch.randn(7).double(), torch.randn(7, 5).double().T
    got, expected = (
        with_gradients(lambda x, f=f: f(x, weight, EPS), [x], upstream) for f in (rms_norm, rms_norm_reference)
    )
    for ours, theirs in zip(got, expected, strict=True):
        assert_fp64(ours, theirs)


@BUILT
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weight_that_learns_gets_the_reference_s_gradient(dtype: torch.dtype) -> None:
    inputs, upstream = [torch.randn(5, 9).to(dtype), torch.randn(9)], torch.randn(5, 9).to(dtype)
    inputs[1] = inputs[1].to(wide(dtype))
    got = with_gradients(partial(rms_norm, eps=EPS), inputs, upstream)
    expected = with_gradients(partial(rms_norm_reference, eps=EPS), inputs, upstream)
    assert got[2].any() and all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("function", FACES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_huge_and_nan_rows_stay_what_they_are(function: type(rms_norm), dtype: torch.dtype) -> None:
    x = torch.tensor([0.0, 1e15, math.nan, 1.0])[:, None].expand(4, 20).to(dtype)
    out, gradient = with_gradients(lambda x: function(x, torch.ones(20).to(dtype), EPS), [x], torch.ones_like(x))
    assert not out[0].any() and gradient[0].isfinite().all()
    torch.testing.assert_close(out[1], torch.ones(20).to(dtype))
    assert out[2].isnan().all() and gradient[2].isnan().all() and not out[3].isnan().any()


@BUILT
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_threads(dtype: torch.dtype) -> None:
    weight = torch.randn(77).to(dtype)
    assert_threads_do_not_matter(lambda x: rms_norm(x, weight, EPS), [torch.randn(1000, 77).to(dtype)])


@BUILT
def test_float16_goes_the_reference_s_way() -> None:
    x, weight = torch.randn(3, 7).half(), torch.randn(7)
    assert torch.equal(rms_norm(x, weight, EPS), rms_norm_reference(x, weight, EPS))


X, WEIGHT = torch.ones(4, 6), torch.ones(6)


@BUILT
@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (X, torch.ones(7)),
        (X, torch.ones(1, 6)),
        (X, WEIGHT.bfloat16()),
        (X.half(), WEIGHT.half()),
        (X.T, torch.ones(4)),
        (X, torch.ones(12)[::2]),
        (torch.ones(()), WEIGHT),
    ],
)
def test_the_raw_forward_refuses_what_it_cannot_read(x: torch.Tensor, weight: torch.Tensor) -> None:
    with pytest.raises((RuntimeError, IndexError)):
        torch.ops.e5kernels.rms_norm_forward(x, weight, EPS)


@BUILT
@pytest.mark.parametrize(
    "change",
    [
        {"g": X[:3]},
        {"g": torch.ones(6, 4)},
        {"g": X.double()},
        {"g": torch.ones(6, 4).T},
        {"inverse": torch.ones(5)},
        {"inverse": torch.ones(3)},
        {"inverse": torch.ones(4).double()},
        {"inverse": torch.ones(8)[::2]},
        {"weight": torch.ones(5)},
    ],
)
def test_the_raw_backward_refuses_what_it_cannot_read(change: dict) -> None:
    good = {"g": X, "x": X, "weight": WEIGHT, "inverse": torch.ones(4)}
    assert torch.ops.e5kernels.rms_norm_backward(**good).shape == X.shape
    with pytest.raises(RuntimeError):
        torch.ops.e5kernels.rms_norm_backward(**(good | change))


@BUILT
def test_ops_are_registered_soundly() -> None:
    x, weight = torch.randn(3, 7, requires_grad=True), torch.randn(7)
    torch.library.opcheck(torch.ops.e5kernels.rms_norm_forward.default, (x, weight, EPS))
    torch.library.opcheck(
        torch.ops.e5kernels.rms_norm_backward.default, (torch.randn(3, 7), x.detach(), weight, torch.rand(3))
    )
