"""RMSNorm's Triton face equals its reference, rows of any width and layout, and its weight's gradient too."""

import math
from functools import partial

import pytest
import torch
from faces import DEVICE, TRITON_DTYPES, Clones, assert_faces_agree, wide, with_gradients
from tolerances import assert_fp32
from torch import Tensor

from e5kernels import rms_norm_triton as room
from e5kernels.rms_norm import rms_norm_reference
from e5kernels.rms_norm_triton import rms_norm_triton

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


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize("shape", [(1031, 4096), (1031, 32, 128), (1, 4096)])
def test_at_mistral_s_widths_on_the_gpu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = torch.randn(shape[-1], device=DEVICE)
    agree(*by(weight), [torch.randn(shape, device=DEVICE).to(dtype)])


@pytest.mark.gpu
def test_the_weight_s_gradient_has_the_same_bits_every_time_on_the_gpu() -> None:
    x, weight = torch.randn(1031, 4096, device=DEVICE).bfloat16(), torch.randn(4096, device=DEVICE)
    first, *others = (with_gradients(partial(rms_norm_triton, eps=EPS), [x, weight], x)[2] for _ in range(3))
    assert first.any() and all(torch.equal(first, other) for other in others)
    expected = with_gradients(partial(rms_norm_reference, eps=EPS), [x.double(), weight.double()], x.double())[2]
    assert (first - expected).norm() < 1e-5 * expected.norm()
