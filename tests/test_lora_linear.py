"""A linear and its adapter are their formula in both faces, and what they drop is keyed_dropout's, to the bit."""

from collections.abc import Sequence
from functools import partial

import pytest
import torch
from faces import DEVICE, TRITON_DTYPES, Function, assert_faces_agree, with_gradients
from tolerances import assert_twice
from torch import Tensor

from e5kernels import lora_linear as room
from e5kernels.dropout import keyed_dropout_reference, signed
from e5kernels.lora_linear import lora_linear, lora_linear_reference, spare_columns, with_room
from e5kernels.lora_linear_triton import lora_linear_triton

STREAM, SCALE = signed(0xFEDCBA9876543210), 1.5
SHAPES = [(5, 77, 13, 4), (33, 48, 80, 16), (1, 77, 40, 1), (70, 300, 20, 70)]  # T, in, out, R


class Case:
    """Inputs of one linear, and both faces as functions of x, A and B alone."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, drop_below: int = 26, bias: bool = False) -> None:
        n_tokens, n_in, n_out, self.rank = shape
        self.spare, self.drop_below = spare_columns(self.rank), drop_below
        self.keys = torch.randint(-(2**63), 2**63 - 1, (n_tokens,)).to(DEVICE) if drop_below else None
        self.weight = (torch.randn(n_out, n_in) / n_in**0.5).to(DEVICE, dtype)
        self.bias = torch.randn(n_out).to(DEVICE, dtype) if bias else None
        a, b = torch.randn(self.rank, n_in) / n_in**0.5, torch.randn(n_out, self.rank) / self.rank**0.5
        self.inputs = [tensor.to(DEVICE, dtype) for tensor in (torch.randn(n_tokens, n_in), a, b)]

    def reference(self, x: Tensor, a: Tensor, b: Tensor, is_read: bool = True) -> Tensor:
        weight, bias = self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype)
        drop = (self.keys, STREAM, self.drop_below)
        return lora_linear_reference(x, weight, bias, a, b, SCALE, *drop, is_read)

    def plain(self, x: Tensor, a: Tensor, b: Tensor, is_read: bool = True) -> Tensor:
        """The kernels, x without spare columns."""
        return self._kernels(x, self.weight, a, b, is_read)

    def spared(self, x: Tensor, a: Tensor, b: Tensor, is_read: bool = True) -> Tensor:
        """The kernels, x with spare columns that hold anything, as the room behind the weight does."""
        weight = with_room(self.weight, self.spare)
        weight.as_strided((self.spare, len(weight)), (len(weight), 1), weight.numel()).fill_(torch.nan)
        x = torch.cat([x, x.new_full((len(x), self.spare), torch.nan)], dim=1)
        return self._kernels(x, weight, a, b, is_read)

    def _kernels(self, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, is_read: bool) -> Tensor:
        drop = (self.keys, STREAM, self.drop_below)
        return lora_linear_triton(x, weight, self.bias, a, b, SCALE, *drop, is_read)


fp32_agree = partial(assert_faces_agree, "lora_linear")


def agree(function: Function, reference: Function, inputs: Sequence[Tensor]) -> None:
    """Hold the kernels to the reference; in bf16 to twice its error, on the interpreter to four times.

    The interpreter cuts bfloat16 off, which in one number is up to twice as far as the nearest.
    """
    if inputs[0].dtype != torch.bfloat16 or DEVICE.type == "cuda":
        fp32_agree(function, reference, inputs)
        return
    upstream = torch.randn(reference(*inputs).shape).bfloat16()
    got, same = (with_gradients(f, inputs, upstream) for f in (function, reference))
    truths = with_gradients(reference, [x.double() for x in inputs], upstream.double())
    for ours, theirs, truth in zip(got, same, truths, strict=True):
        assert ours.dtype == torch.bfloat16
        assert_twice(ours, 2 * theirs.float() - truth.float(), truth.float())


@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize("drop_below", [0, 26])
@pytest.mark.parametrize("shape", SHAPES)
def test_triton_equals_reference(shape: tuple[int, ...], drop_below: int, dtype: torch.dtype) -> None:
    case = Case(shape, dtype, drop_below, bias=shape[0] == 5)
    agree(case.plain, case.reference, case.inputs)
    agree(case.spared, case.reference, case.inputs)


@pytest.mark.parametrize("face", ["plain", "spared"])
def test_what_is_not_read_and_an_input_without_gradient_leave_the_other_gradients_as_they_are(face: str) -> None:
    case = Case(SHAPES[1], torch.float32)
    function, upstream = (
        {"plain": case.plain, "spared": case.spared}[face],
        torch.randn(SHAPES[1][0], SHAPES[1][2], device=DEVICE),
    )
    leaves = [tensor.requires_grad_() for tensor in case.inputs]
    wanted = torch.autograd.grad(case.reference(*leaves), leaves, upstream)
    unread = function(*leaves, is_read=False)
    assert not unread.any() and unread.shape == upstream.shape
    for got, expected in zip(torch.autograd.grad(unread, leaves, upstream), wanted, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    alone = torch.autograd.grad(function(leaves[0].detach(), *leaves[1:]), leaves[1:], upstream)
    for got, expected in zip(alone, wanted[1:], strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize("width", [7, 300])
def test_every_pass_and_micro_batch_draws_keyed_dropout_s_bits(width: int, dtype: torch.dtype) -> None:
    """With A = 1 or B A = 1 a kernel's results are sums over one drawn row or column, or the drawn elements."""
    n_tokens, drop_below = 37, 128  # scaled by 2, all sums are exact
    case = Case((n_tokens, width, 1, 1), dtype, drop_below)
    case.weight.zero_()
    ones = torch.ones(n_tokens, width, dtype=dtype, device=DEVICE)
    drawn = keyed_dropout_reference(ones.float(), case.keys, STREAM, drop_below)
    a, b = torch.eye(width, device=DEVICE), torch.ones(1, width, device=DEVICE)
    drop = (STREAM, drop_below)
    for pieces in ([n_tokens], [1, 20, 16]):
        found = []
        for x, keys in zip(ones.split(pieces), case.keys.split(pieces), strict=True):
            x = x.clone().requires_grad_()
            row = torch.ones(1, width, device=DEVICE, requires_grad=True)
            y = lora_linear_triton(x, case.weight, None, row, b[:, :1], 1.0, keys, *drop, True)
            dx, d_row = torch.autograd.grad(y, (x, row), torch.ones_like(y))
            z = lora_linear_triton(x, case.weight, None, a, b, 1.0, keys, *drop, True)
            found.append((dx.float(), d_row, z.float()))
        dx, d_row, z = zip(*found, strict=True)
        assert torch.equal(torch.cat(dx), drawn) and torch.equal(sum(d_row), drawn.sum(0, keepdim=True))
        # in bf16 the sum of a row is rounded, but no power of 2 that is in it is lost below 256
        assert (torch.cat(z) - drawn.sum(1, keepdim=True)).abs().max() <= (0 if dtype == torch.float32 else 2)


def test_no_token_gives_adapters_no_gradient() -> None:
    case = Case((0, 13, 7, 3), torch.float32)
    for function in (case.plain, case.spared):
        agree(function, case.reference, case.inputs)


@pytest.mark.parametrize("drop_below", [0, 77])
def test_the_reference_s_gradient_is_its_derivative(drop_below: int) -> None:
    case = Case((4, 9, 5, 2), torch.float64, drop_below, bias=True)
    assert torch.autograd.gradcheck(case.reference, [tensor.requires_grad_() for tensor in case.inputs])


def test_the_reference_reads_no_spare_column_and_the_face_is_picked_by_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert room.face(torch.device("cpu")) == "reference" and room.face(torch.device("cuda", 1)) == "triton"
    case = Case(SHAPES[0], torch.float32)
    drop, (x, a, b) = (case.keys, STREAM + 2**64, case.drop_below), case.inputs
    expected = case.reference(x, a, b)
    extended = torch.cat([x, x.new_full((len(x), case.spare), torch.nan)], dim=1)
    monkeypatch.setattr(room, "face", lambda device: "reference")
    assert torch.equal(lora_linear(extended, case.weight, None, a, b, SCALE, *drop), expected)
    monkeypatch.setattr(room, "face", lambda device: "triton")
    monkeypatch.setattr(room, "lora_linear_reference", None)
    weight = with_room(case.weight, case.spare)
    assert torch.equal(weight, case.weight)
    for arguments in ((x, case.weight), (extended, weight)):
        got = lora_linear(*arguments, None, a, b, SCALE, *drop)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_what_does_not_fit_is_refused() -> None:
    case = Case(SHAPES[0], torch.float32)
    x, a, b = case.inputs
    extended = torch.nn.functional.pad(x, (0, case.spare))
    drop = (case.keys, STREAM, case.drop_below)
    for wrong in ((x[:, 1:], a, b), (x[0], a, b), (x, a[:, 1:], b), (x, a, b[1:]), (x, a[1:], b)):
        with pytest.raises(ValueError, match="x must be"):
            lora_linear_triton(wrong[0], case.weight, None, *wrong[1:], SCALE, *drop, True)
    for wrong, weight in ((extended, case.weight), (extended[:, :-14], with_room(case.weight, case.spare))):
        with pytest.raises(ValueError, match="must hold R = 4 and weight must be"):
            lora_linear_triton(wrong, weight, None, a, b, SCALE, *drop, True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize(("n_in", "n_out"), [(4096, 4096), (4096, 14336), (14336, 4096)])
def test_at_mistral_s_widths_on_the_gpu(n_in: int, n_out: int, dtype: torch.dtype) -> None:
    for n_tokens in (1, 1031):
        case = Case((n_tokens, n_in, n_out, 16), dtype)
        for function in (case.plain, case.spared):
            results = [function(*case.inputs) for _ in range(2)]
            assert torch.equal(*results)
            agree(function, case.reference, case.inputs)
