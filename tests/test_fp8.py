"""Rows in fp8: what their numbers are, that nothing gets lost in them, and that kernels write the reference's bits."""

import math
from collections.abc import Callable

import pytest
import torch
from faces import DEVICE, TRITON_DTYPES, assert_faces_agree
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from e5kernels import fp8 as room
from e5kernels.fp8 import E4M3, LARGEST, Rows, quantise_rows, quantise_rows_reference, rows_of, values
from e5kernels.fp8_triton import add_rms_norm_rows_triton, glu_rows_triton, quantise_rows_triton
from e5kernels.rms_norm import add_rms_norm_reference
from e5kernels.rms_norm_triton import add_rms_norm_triton
from e5kernels.swiglu import geglu_reference, swiglu_reference

SHAPES = [(1, 1), (3, 7), (5, 255), (2, 256), (9, 257), (2, 3, 33), (0, 5)]
# Ties, the subnormals and their border, and the largest number.
EDGES = [0.0, -0.0, 2**-9, 2**-10, 1.5 * 2**-9, 2**-6, 0.99 * 2**-6, 1.0625, 1.1875, -1.1875, 17.0, 440.0, -448.0]


def nearest(x: float) -> float:
    """Round to e4m3 by its definition: 3 bits behind the first, which is worth 2^-6 or more; ties to even."""
    step = 2.0 ** (max(math.floor(math.log2(abs(x))), -6) - 3) if x else 1.0
    return round(x / step) * step


def test_numbers_are_the_nearest_of_e4m3_and_a_row_ends_at_448() -> None:
    x = torch.cat([torch.tensor([EDGES]), torch.randn(40, len(EDGES)) * torch.logspace(-6, 6, 40)[:, None]])
    q, scale = quantise_rows_reference(x)
    assert q.dtype == E4M3 and scale.dtype == torch.float32
    torch.testing.assert_close(scale[:, 0], x.abs().amax(1) / 448, rtol=0, atol=0)
    for row, codes in zip(x, q.double(), strict=True):
        inverse = torch.tensor(448.0) / row.abs().max()
        assert codes.tolist() == [nearest(item) for item in (row * inverse).tolist()]
    assert (q.double().abs().amax(1) == LARGEST).all()


def test_a_row_of_zeros_is_zeros_and_the_smallest_rows_keep_their_numbers() -> None:
    for size in (0.0, 1e-45, 1e-38, 3e38):
        x = size * torch.tensor([[1.0, -0.5, 0.25]])
        q, scale = quantise_rows_reference(x)
        torch.testing.assert_close(q.float() * scale, x, rtol=2.0**-4, atol=2.0**-136)  # half a step, half the least


class Divisors(TorchDispatchMode):
    """Notes what is divided by."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[object] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        if func.overloadpacket is torch.ops.aten.div:
            self.seen.append(args[1])
        return func(*args, **(kwargs or {}))


def test_the_definition_divides_by_no_number() -> None:
    """On CUDA torch takes the product with its reciprocal for that, which is another number in the last bit."""
    with Divisors() as divisors:
        quantise_rows_reference(torch.randn(3, 9))
    assert len(divisors.seen) == 2 and all(isinstance(x, Tensor) and x.ndim for x in divisors.seen)


@pytest.mark.parametrize("quantise", [quantise_rows_reference, quantise_rows_triton])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.filterwarnings("ignore:invalid value")  # numpy's, of the interpreter: inf * 0
def test_what_is_not_finite_makes_its_row_not_finite(quantise: Callable, bad: float) -> None:
    x = torch.randn(3, 9)
    x[1, 4] = bad
    q, scale = (part.cpu() for part in quantise(x.to(DEVICE)))
    back = values(q, torch.float32) * scale
    assert not back[1].isfinite().any()
    assert back[[0, 2]].isfinite().all()


def test_all_codes_are_decoded_exactly() -> None:
    q = torch.arange(256, dtype=torch.uint8).view(E4M3).view(16, 16)
    for dtype in (torch.float32, torch.float64):
        for codes in (q, q.T):
            torch.testing.assert_close(values(codes, dtype), codes.to(dtype), rtol=0, atol=0, equal_nan=True)


def same_bits(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert got[0].dtype == E4M3 and got[0].shape == expected[0].shape and got[1].shape == expected[1].shape
    assert torch.equal(got[0].view(torch.uint8), expected[0].view(torch.uint8))
    assert torch.equal(got[1], expected[1])


@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_triton_writes_the_reference_s_bits(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = (torch.randn(shape) * torch.randn(*shape[:-1], 1).exp()).to(DEVICE, dtype)
    same_bits(quantise_rows_triton(x), quantise_rows_reference(x))


def test_triton_rounds_as_the_reference_at_every_edge() -> None:
    x = torch.tensor(EDGES, device=DEVICE)
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)  # all of bf16 that is finite
    every = every[every.isfinite()].float().to(DEVICE)
    rows = torch.stack([every / 448, every.flip(0)], 1)
    for each in (x[None], -x[None], x[:, None], torch.zeros(2, 3, device=DEVICE), rows):
        same_bits(quantise_rows_triton(each), quantise_rows_reference(each))


def test_rows_are_read_where_they_lie() -> None:
    packed = torch.randn(6, 40, device=DEVICE)
    for x in (packed[:, 8:24], packed[:, 1:8], packed.T, packed[:, ::3]):
        same_bits(quantise_rows_triton(x), quantise_rows_reference(x))


def test_rows_without_elements_are_refused() -> None:
    for shape in ((3, 0), ()):
        with pytest.raises(ValueError, match="K > 0: got"):
            quantise_rows_triton(torch.empty(shape))


EPS = 1e-5
FUSED = {  # inputs, what returns y, its codes and scales, y's definition, its row in tolerances.py
    "swiglu": (2, lambda gate, up: glu_rows_triton(gate, up, False), swiglu_reference, "glu"),
    "geglu": (2, lambda gate, up: glu_rows_triton(gate, up, True), geglu_reference, "glu"),
    **{
        name: (
            n_inputs,
            lambda x, added=None: add_rms_norm_rows_triton(x, added, weight_of(x), EPS)[1:],
            lambda x, added=None: add_rms_norm_reference(x, added, weight_of(x), EPS)[1],
            "rms_norm",
        )
        for name, n_inputs in (("rms_norm", 1), ("add_rms_norm", 2))
    },
}  # fmt: skip


def weight_of(x: Tensor) -> Tensor:
    return torch.linspace(0.5, 1.5, x.shape[-1], device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))


@pytest.mark.parametrize("op", FUSED)
@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_fused_op_equals_its_own_and_quantises_what_it_wrote(
    op: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    n_inputs, function, reference, name = FUSED[op]
    inputs = [2 * torch.randn(shape).to(DEVICE, dtype) for _ in range(n_inputs)]
    y, q, scale = function(*inputs)
    same_bits((q, scale), quantise_rows_reference(y))
    rounds = 2 if op == "add_rms_norm" else 1
    assert_faces_agree(name, lambda *each: function(*each)[0], reference, inputs, is_triton=True, rounds=rounds)


@pytest.mark.parametrize("op", FUSED)
def test_halves_of_a_packed_projection_are_read_where_they_lie(op: str) -> None:
    n_inputs, function, reference, name = FUSED[op]
    inputs = torch.randn(3, 14, device=DEVICE).split(7, dim=1)[:n_inputs]
    assert_faces_agree(name, lambda *each: function(*each)[0], reference, inputs, is_triton=True)


@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize("shape", [(3, 7), (9, 257), (2, 3, 33), (0, 5)])
def test_the_residual_and_its_gradient_pass_with_the_norm_s(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """And, what recompute relies on, a kept sum is normalised and quantised again to the same bits."""
    x, added, g_h, g_y = (torch.randn(shape).to(DEVICE, dtype).requires_grad_() for _ in range(4))
    weight = weight_of(x).requires_grad_()
    got, expected = (f(x, added, weight, EPS) for f in (add_rms_norm_rows_triton, add_rms_norm_triton))
    assert torch.equal(got[0], expected[0])
    kept = got[0].detach().requires_grad_()
    again = add_rms_norm_rows_triton(kept, None, weight, EPS)
    assert again[0].data_ptr() == kept.data_ptr() and torch.equal(again[1], got[1])
    same_bits(again[2:], got[2:])
    for used, gradients in (((0, 1), (g_h, g_y)), ((1,), (g_y,)), ((0,), (g_h,))):
        ours, theirs, replayed = (
            torch.autograd.grad([each[i] for i in used], inputs, gradients, retain_graph=True, materialize_grads=True)
            for each, inputs in ((got, (x, added, weight)), (expected, (x, added, weight)), (again, (kept, weight)))
        )
        assert all(map(torch.equal, ours, theirs)) and all(map(torch.equal, ours[1:], replayed))


def test_fused_ops_refuse_what_does_not_fit() -> None:
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match="weight must be"):
        add_rms_norm_rows_triton(x, None, torch.ones(2), EPS)
    for added in (x[:1], x.double(), x.T):
        with pytest.raises(ValueError, match="added must be like x"):
            add_rms_norm_rows_triton(x, added, torch.ones(3), EPS)
    with pytest.raises(ValueError, match="gate and up must be"):
        glu_rows_triton(torch.ones(2, 3), torch.ones(2, 4), False)


def test_the_face_is_picked_by_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert room.face(torch.device("cpu")) == "reference" and room.face(torch.device("cuda", 1)) == "triton"
    x, other = torch.randn(2, 5, 8, device=DEVICE)
    calls = (lambda: rows_of(x), lambda: room.add_rms_norm_rows(x, other, weight_of(x), EPS)[1],
             lambda: room.swiglu_rows(x, other), lambda: room.geglu_rows(x, other))  # fmt: skip
    monkeypatch.setattr(room, "face", lambda device: "reference")
    expected = [call() for call in calls]
    monkeypatch.setattr(room, "face", lambda device: "triton")
    for name in ("quantise_rows_reference", "add_rms_norm", "swiglu", "geglu"):
        monkeypatch.setattr(room, name, None)
    for call, wanted in zip(calls, expected, strict=True):
        got = call()
        torch.testing.assert_close(got.x, wanted.x, atol=1e-6, rtol=1e-6)
        back = [rows.q.float() * rows.scale for rows in (got, wanted)]  # on CUDA both are e4m3
        torch.testing.assert_close(*back, atol=0.02, rtol=0.07)


def test_rows_are_gathered_with_their_scales_whatever_holds_their_codes() -> None:
    x, kept = torch.randn(5, 8), torch.tensor([4, 0, 4])
    q, scale = quantise_rows(x)
    for rows in (Rows(x, q, scale), rows_of(x)):
        got, wanted = rows.gathered(x[kept], kept), rows_of(x[kept])
        assert torch.equal(got.x, wanted.x) and torch.equal(got.scale, wanted.scale)
        assert torch.equal(got.q.float(), wanted.q)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize("dim", [4096, 14336])
def test_at_mistral_s_widths_on_the_gpu(dim: int, dtype: torch.dtype) -> None:
    for n_rows in (1, 1031):
        x, up = torch.randn(2, n_rows, dim, device=DEVICE).to(dtype)
        same_bits(quantise_rows_triton(x), quantise_rows_reference(x))
        for n_inputs, function, reference, name in FUSED.values():
            y, q, scale = function(*(x, up)[:n_inputs])
            same_bits((q, scale), quantise_rows_reference(y))
            assert_faces_agree(name, lambda *e, f=function: f(*e)[0], reference, (x, up)[:n_inputs], is_triton=True)
