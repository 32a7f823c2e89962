"""RMSNorm's Triton face equals its reference, rows of any width and layout, and its weight's gradient too."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from faces import DEVICE, TRITON_DTYPES, Clones, assert_faces_agree, wide, with_gradients
from tolerances import assert_fp32
from torch import Tensor

from e5kernels import rms_norm_triton as room
from e5kernels.rms_norm import add_rms_norm_reference, rms_norm_reference
from e5kernels.rms_norm_triton import add_rms_norm_triton, rms_norm_triton

EPS = 1e-5
agree = partial(assert_faces_agree, "rms_norm", is_triton=True)


def by(weight: Tensor) -> tuple[partial, partial]:
    """Both faces as functions of x alone."""
    return tuple(partial(f, weight=weight, eps=EPS) for f in (rms_norm_triton, rms_norm_reference))


@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize("width", [1, 7, 64, 77, 129])
@pytest.mark.parametrize("wide_weight", [False, True])
def test_triton_equals_reference(width: int, dtype: torch.dtype, wide_weight: bool) -> None:
    weight = torch.randn(width).to(DEVICE, wide(dtype) if wide_weight else dtype)
    for shape in ((1, width), (70, width), (2, 3, width), (width,), (0, width), (2, 0, width)):
        agree(*by(weight), [torch.randn(shape).to(DEVICE, dtype)])


@pytest.mark.parametrize("tile", [16, 64, 4096])
@pytest.mark.parametrize("n_partials", [1, 3, 256])
def test_the_weight_s_gradient_is_a_sum_over_all_rows(
    tile: int, n_partials: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "TILE", tile)
    monkeypatch.setattr(room, "N_PARTIALS", n_partials)
    faces = (partial(f, eps=EPS) for f in (rms_norm_triton, rms_norm_reference))
    agree(*faces, [torch.randn(3, 9, 7, device=DEVICE), torch.randn(7, device=DEVICE)])


def test_a_weight_in_fp32_beside_bf16_rows_gets_its_gradient_in_fp32() -> None:
    inputs = [torch.randn(9, 13).bfloat16().to(DEVICE), torch.randn(13, device=DEVICE)]
    upstream = torch.randn(9, 13).bfloat16().to(DEVICE)
    got = with_gradients(partial(rms_norm_triton, eps=EPS), inputs, upstream)[2]
    expected = with_gradients(partial(rms_norm_reference, eps=EPS), [x.float() for x in inputs], upstream.float())[2]
    assert got.dtype == torch.float32
    assert_fp32("rms_norm", got, expected)


def test_no_rows_give_a_weight_no_gradient() -> None:
    inputs = [torch.randn(0, 13, device=DEVICE), torch.randn(13, device=DEVICE)]
    gradient = with_gradients(partial(rms_norm_triton, eps=EPS), inputs, inputs[0])[2]
    assert gradient.shape == (13,) and not gradient.any()


@pytest.mark.parametrize("dtype", TRITON_DTYPES)
def test_heads_of_a_packed_projection_are_normalised_where_they_lie(dtype: torch.dtype) -> None:
    packed, weight = torch.randn(5, 7, 24).to(DEVICE, dtype), torch.randn(24, device=DEVICE)
    for x in (
        packed[:, 2:5],
        packed[:, 5:6],
        packed[:, 2:5].transpose(0, 1),
        packed[:, 0],
        packed[:1].expand(5, 7, 24),
    ):
        with torch.no_grad(), Clones() as clones:
            rms_norm_triton(x, weight, EPS)
        assert not x.is_contiguous() and clones.n == 0
        agree(*by(weight), [x])


@pytest.mark.parametrize("dtype", TRITON_DTYPES)
def test_every_other_layout_is_read_rightly(dtype: torch.dtype) -> None:
    weight, packed = torch.randn(14).to(DEVICE, dtype)[::2], torch.randn(6, 4, 20).to(DEVICE, dtype)
    for x in (packed[..., 3:10], packed[..., :14:2], packed[:, 0, :7].T.contiguous().T, packed[None, ::2, ::2, :7]):
        agree(*by(weight), [x])


def test_a_gradient_that_is_not_contiguous_is_read_rightly() -> None:
    x, weight, upstream = (torch.randn(shape, device=DEVICE) for shape in ((5, 7), (7,), (7, 5)))
    pairs = zip(*(with_gradients(f, [x], upstream.T) for f in by(weight)), strict=True)
    for ours, theirs in pairs:
        assert_fp32("rms_norm", ours, theirs)


@pytest.mark.parametrize("dtype", TRITON_DTYPES)
def test_zeros_huge_and_nan_rows_stay_what_they_are(dtype: torch.dtype) -> None:
    x = torch.tensor([0.0, 1e15, math.nan, 1.0])[:, None].expand(4, 20).to(DEVICE, dtype)
    weight = torch.ones(20).to(DEVICE, dtype)
    out, gradient = with_gradients(lambda x: rms_norm_triton(x, weight, EPS), [x], torch.ones_like(x))
    assert not out[0].any() and gradient[0].isfinite().all()
    torch.testing.assert_close(out[1], weight, rtol=1e-2, atol=0.0)
    assert out[2].isnan().all() and gradient[2].isnan().all() and not out[3].isnan().any()


@pytest.mark.parametrize(("shape", "weight"), [((4, 6), (7,)), ((4, 6), (1, 6)), ((4, 6), ()), ((), (1,))])
def test_a_weight_that_does_not_fit_is_refused(shape: tuple[int, ...], weight: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="weight must be"):
        rms_norm_triton(torch.ones(shape, device=DEVICE), torch.ones(weight, device=DEVICE), EPS)


def joined(function: Callable, weight: Tensor, spare: int = 0) -> Callable[..., Tensor]:
    """Both results of an add and norm as one tensor."""

    def both(x: Tensor, added: Tensor | None = None) -> Tensor:
        h, y = function(x, added, weight, EPS, spare)
        assert y.shape == (*x.shape[:-1], x.shape[-1] + spare)
        return torch.cat([h, y[..., : x.shape[-1]]], -1)

    return both


@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize("spare", [0, 16])
@pytest.mark.parametrize("shape", [(1, 7), (70, 77), (3, 129), (2, 3, 64), (0, 9)])
def test_an_added_term_and_both_gradients_pass_in_one_go(
    shape: tuple[int, ...], spare: int, dtype: torch.dtype
) -> None:
    weight = torch.randn(shape[-1], device=DEVICE)
    faces = [joined(f, weight, spare) for f in (add_rms_norm_triton, add_rms_norm_reference)]
    x, added = (torch.randn(shape).to(DEVICE, dtype) for _ in range(2))
    agree(*faces, [x], rounds=2)
    agree(*faces, [x, added], rounds=2)


@pytest.mark.parametrize("dtype", TRITON_DTYPES)
def test_a_kept_sum_is_normalised_again_to_the_same_bits(dtype: torch.dtype) -> None:
    """What recompute relies on: from h alone, y and both gradients' sum are those from x and the added term."""
    weight = torch.randn(77, device=DEVICE)
    x, added, g_h, g_y = (torch.randn(9, 77).to(DEVICE, dtype).requires_grad_() for _ in range(4))
    h, y = add_rms_norm_triton(x, added, weight, EPS, 16)
    g_y = torch.nn.functional.pad(g_y, (0, 16), value=torch.nan)  # of columns that are not the norm's
    gradients = torch.autograd.grad((h, y), (x, added), (g_h, g_y))
    kept = h.detach().requires_grad_()
    again, y_again = add_rms_norm_triton(kept, None, weight, EPS, 16)
    assert again.data_ptr() == kept.data_ptr() and torch.equal(y_again[:, :77], y[:, :77])
    (gradient,) = torch.autograd.grad((again, y_again), (kept,), (g_h, g_y))
    assert gradient.isfinite().all() and all(torch.equal(gradient, g) for g in gradients)


def test_a_result_that_is_not_used_adds_nothing_to_the_gradient() -> None:
    weight = torch.randn(13, device=DEVICE)
    for i in (0, 1):
        x, added = (torch.randn(5, 13, device=DEVICE, requires_grad=True) for _ in range(2))
        results = [f(x, added, weight, EPS)[i] for f in (add_rms_norm_triton, add_rms_norm_reference)]
        got, expected = (torch.autograd.grad(y, (x, added), torch.ones_like(y)) for y in results)
        for ours, theirs in zip(got, expected, strict=True):
            assert_fp32("rms_norm", ours, theirs)


def test_an_added_term_of_another_shape_is_refused() -> None:
    x, weight = torch.randn(5, 13, device=DEVICE), torch.randn(13, device=DEVICE)
    for added in (x[:1], x.double(), x.T):
        with pytest.raises(ValueError, match="added must be like x"):
            add_rms_norm_triton(x, added, weight, EPS)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize("shape", [(1031, 4096), (1031, 32, 128), (1, 4096)])
def test_at_mistral_s_widths_on_the_gpu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = torch.randn(shape[-1], device=DEVICE)
    agree(*by(weight), [torch.randn(shape, device=DEVICE).to(dtype)])
    faces = [joined(f, weight, 16) for f in (add_rms_norm_triton, add_rms_norm_reference)]
    agree(*faces, [torch.randn(shape, device=DEVICE).to(dtype) for _ in range(2)])


@pytest.mark.gpu
def test_the_weight_s_gradient_has_the_same_bits_every_time_on_the_gpu() -> None:
    x, weight = torch.randn(1031, 4096, device=DEVICE).bfloat16(), torch.randn(4096, device=DEVICE)
    first, *others = (with_gradients(partial(rms_norm_triton, eps=EPS), [x, weight], x)[2] for _ in range(3))
    assert first.any() and all(torch.equal(first, other) for other in others)
    expected = with_gradients(partial(rms_norm_reference, eps=EPS), [x.double(), weight.double()], x.double())[2]
    assert (first - expected).norm() < 1e-5 * expected.norm()
