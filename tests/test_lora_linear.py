"""A linear and its adapter are their formula in both faces, and what they drop is keyed_dropout's, to the bit."""

from collections.abc import Sequence
from functools import partial

import pytest
import torch
from faces import DEVICE, TRITON_DTYPES, Function, assert_faces_agree, with_gradients
from tolerances import assert_twice
from torch import Tensor

from e5kernels import lora_linear as room
from e5kernels.adapted import Adapted, Drop
from e5kernels.dropout import keyed_dropout_reference, signed
from e5kernels.lora_linear import lora_linear, lora_linear_reference, spare_columns, with_room
from e5kernels.lora_linear_triton import lora_linear_triton

STREAM, SCALE = signed(0xFEDCBA9876543210), 1.5
SHAPES = [(5, 77, 13, 4), (33, 48, 80, 16), (1, 77, 40, 1), (70, 300, 20, 70)]  # T, in, out, R


class Case:
    """Inputs of linears that read one x, and both faces as functions of x and of every A and B alone.

    Their outputs are shown side by side, (T, all out).
    """

    def __init__(
        self, shape: Sequence[int], dtype: torch.dtype, drop_below: int = 26, bias: bool = False, n: int = 1
    ) -> None:
        n_tokens, n_in, n_out, self.rank = shape
        self.spare = spare_columns(self.rank)
        keys = torch.randint(-(2**63), 2**63 - 1, (n_tokens,)).to(DEVICE) if drop_below else None
        self.drop = Drop(keys, drop_below)
        widths = [n_out + 3 * i for i in range(n)]
        self.weights = [(torch.randn(width, n_in) / n_in**0.5).to(DEVICE, dtype) for width in widths]
        self.biases = [torch.randn(width).to(DEVICE, dtype) if bias else None for width in widths]
        self.inputs = [torch.randn(n_tokens, n_in).to(DEVICE, dtype)]
        for width in widths:
            a, b = torch.randn(self.rank, n_in) / n_in**0.5, torch.randn(width, self.rank) / self.rank**0.5
            self.inputs += [a.to(DEVICE, dtype), b.to(DEVICE, dtype)]

    def linears(self, weights: Sequence[Tensor], factors: Sequence[Tensor], dtype: torch.dtype) -> list[Adapted]:
        streams = (STREAM + 7 * i for i in range(len(weights)))
        biases = (None if bias is None else bias.to(dtype) for bias in self.biases)
        return [Adapted(*each) for each in zip(weights, biases, factors[::2], factors[1::2], streams, strict=True)]

    def reference(self, x: Tensor, *factors: Tensor, is_read: bool = True) -> Tensor:
        linears = self.linears([weight.to(x.dtype) for weight in self.weights], factors, x.dtype)
        return torch.cat(lora_linear_reference(x, linears, SCALE, self.drop, is_read), dim=1)

    def plain(self, x: Tensor, *factors: Tensor, is_read: bool = True) -> Tensor:
        """The kernels, x without spare columns."""
        linears = self.linears(self.weights, factors, x.dtype)
        return torch.cat(lora_linear_triton(x, linears, SCALE, self.drop, is_read), dim=1)

    def spared(self, x: Tensor, *factors: Tensor, is_read: bool = True) -> Tensor:
        """The kernels, x with spare columns that hold anything, as the room behind a weight does."""
        weights = [with_room(weight, self.spare) for weight in self.weights]
        for weight in weights:
            weight.as_strided((self.spare, len(weight)), (len(weight), 1), weight.numel()).fill_(torch.nan)
        x = torch.cat([x, x.new_full((len(x), self.spare), torch.nan)], dim=1)
        linears = self.linears(weights, factors, x.dtype)
        return torch.cat(lora_linear_triton(x, linears, SCALE, self.drop, is_read), dim=1)


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


def agree_over_long_sums(function: Function, reference: Function, inputs: Sequence[Tensor]) -> None:
    """Hold the kernels in any dtype to twice plain torch's error, twice: sums go in another order, in two kernels.

    The table's numbers for fp32 are those of short sums. At Mistral-7B's widths plain torch (CPU, MKL) errs by 7e-4 in
    dA, whose elements reach 1,700 and pass through 0.
    """
    upstream = torch.randn_like(reference(*inputs))
    got, same = (with_gradients(f, inputs, upstream) for f in (function, reference))
    truths = with_gradients(reference, [x.double() for x in inputs], upstream.double())
    for ours, theirs, truth in zip(got, same, truths, strict=True):
        assert ours.dtype == inputs[0].dtype
        assert_twice(ours, theirs, truth.float(), rounds=2)


@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize("drop_below", [0, 26])
@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_triton_equals_reference(shape: tuple[int, ...], n: int, drop_below: int, dtype: torch.dtype) -> None:
    case = Case(shape, dtype, drop_below, bias=shape[0] == 5, n=n)
    agree(case.plain, case.reference, case.inputs)
    agree(case.spared, case.reference, case.inputs)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("face", ["reference", "plain", "spared"])
def test_what_is_not_read_and_an_input_without_gradient_leave_the_other_gradients_as_they_are(
    face: str, n: int
) -> None:
    case = Case(SHAPES[1], torch.float32, n=n)
    function, leaves = getattr(case, face), [tensor.requires_grad_() for tensor in case.inputs]
    y = case.reference(*leaves)
    upstream = torch.randn_like(y)
    wanted = torch.autograd.grad(y, leaves, upstream)
    unread = function(*leaves, is_read=False)
    assert not unread.any() and unread.shape == upstream.shape
    for got, expected in zip(torch.autograd.grad(unread, leaves, upstream), wanted, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    alone = torch.autograd.grad(function(leaves[0].detach(), *leaves[1:]), leaves[1:], upstream)
    for got, expected in zip(alone, wanted[1:], strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_what_is_strided_and_what_reaches_one_output_alone_have_the_reference_s_gradients() -> None:
    case = Case(SHAPES[0], torch.float32, n=3)
    wide = torch.randn(77, 10, device=DEVICE).T.requires_grad_()[::2]  # x is (5, 77), its rows interleaved
    leaves = [wide, *(tensor.requires_grad_() for tensor in case.inputs[1:])]
    for columns in (slice(0, None), slice(13, 16)):  # of all outputs, and of the second
        sums = [function(*leaves)[:, columns].square().sum() for function in (case.plain, case.reference)]
        got, expected = (torch.autograd.grad(each, leaves) for each in sums)
        for ours, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_linears_together_are_those_linears_alone() -> None:
    case = Case((9, 40, 20, 4), torch.float64, bias=True, n=3)
    x, *factors = (tensor.requires_grad_() for tensor in case.inputs)
    linears = case.linears(case.weights, factors, x.dtype)
    together = lora_linear_reference(x, linears, SCALE, case.drop)
    alone = [lora_linear_reference(x, [linear], SCALE, case.drop)[0] for linear in linears]
    assert all(map(torch.equal, together, alone))
    upstream = [torch.randn_like(y) for y in alone]
    for leaf in (x, *factors):
        got, expected = (torch.autograd.grad(ys, leaf, upstream, retain_graph=True)[0] for ys in (together, alone))
        torch.testing.assert_close(got, expected, atol=1e-14, rtol=1e-12)


@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize("width", [7, 300])
def test_every_pass_and_micro_batch_draws_keyed_dropout_s_bits(width: int, dtype: torch.dtype) -> None:
    """With A = 1 or B A = 1 a kernel's results are sums over one drawn row or column, or the drawn elements."""
    n_tokens, drop_below = 37, 128  # scaled by 2, all sums are exact
    case = Case((n_tokens, width, 1, 1), dtype, drop_below)
    weight = case.weights[0].zero_()
    ones = torch.ones(n_tokens, width, dtype=dtype, device=DEVICE)
    drawn = keyed_dropout_reference(ones.float(), case.drop.keys, STREAM, drop_below)
    a, b = torch.eye(width, device=DEVICE), torch.ones(1, width, device=DEVICE)
    for pieces in ([n_tokens], [1, 20, 16]):
        found = []
        for x, keys in zip(ones.split(pieces), case.drop.keys.split(pieces), strict=True):
            drop, x = Drop(keys, drop_below), x.clone().requires_grad_()
            row = torch.ones(1, width, device=DEVICE, requires_grad=True)
            (y,) = lora_linear_triton(x, [Adapted(weight, None, row, b[:, :1], STREAM)], 1.0, drop, True)
            dx, d_row = torch.autograd.grad(y, (x, row), torch.ones_like(y))
            (z,) = lora_linear_triton(x, [Adapted(weight, None, a, b, STREAM)], 1.0, drop, True)
            found.append((dx.float(), d_row, z.float()))
        dx, d_row, z = zip(*found, strict=True)
        assert torch.equal(torch.cat(dx), drawn) and torch.equal(sum(d_row), drawn.sum(0, keepdim=True))
        # in bf16 the sum of a row is rounded, but no power of 2 that is in it is lost below 256
        assert (torch.cat(z) - drawn.sum(1, keepdim=True)).abs().max() <= (0 if dtype == torch.float32 else 2)


def test_no_token_gives_adapters_no_gradient() -> None:
    case = Case((0, 13, 7, 3), torch.float32, n=2)
    for function in (case.plain, case.spared):
        agree(function, case.reference, case.inputs)


@pytest.mark.parametrize("drop_below", [0, 77])
def test_the_reference_s_gradient_is_its_derivative(drop_below: int) -> None:
    case = Case((4, 9, 5, 2), torch.float64, drop_below, bias=True, n=2)
    assert torch.autograd.gradcheck(case.reference, [tensor.requires_grad_() for tensor in case.inputs])


def test_the_reference_reads_no_spare_column_and_the_face_is_picked_by_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert room.face(torch.device("cpu")) == "reference" and room.face(torch.device("cuda", 1)) == "triton"
    case = Case(SHAPES[0], torch.float32)
    x, *factors = case.inputs
    expected = case.reference(x, *factors)
    extended = torch.cat([x, x.new_full((len(x), case.spare), torch.nan)], dim=1)
    monkeypatch.setattr(room, "face", lambda device: "reference")
    linears = [linear._replace(stream=STREAM + 2**64) for linear in case.linears(case.weights, factors, x.dtype)]
    assert torch.equal(lora_linear(extended, linears, SCALE, case.drop)[0], expected)
    monkeypatch.setattr(room, "face", lambda device: "triton")
    monkeypatch.setattr(room, "lora_linear_reference", None)
    weight = with_room(case.weights[0], case.spare)
    assert torch.equal(weight, case.weights[0])
    for wide, its_linears in ((x, linears), (extended, [linears[0]._replace(weight=weight)])):
        (got,) = lora_linear(wide, its_linears, SCALE, case.drop)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_what_does_not_fit_is_refused() -> None:
    case = Case(SHAPES[0], torch.float32)
    x, a, b = case.inputs
    extended = torch.nn.functional.pad(x, (0, case.spare))
    fits = Adapted(case.weights[0], None, a, b, STREAM)
    for wide, *others in ((x[:, 1:], a, b), (x[0], a, b), (x, a[:, 1:], b), (x, a, b[1:]), (x, a[1:], b)):
        for linears in ([Adapted(case.weights[0], None, *others, STREAM)], [fits, fits._replace(lora_b=b[1:])]):
            with pytest.raises(ValueError, match="x must be"):
                lora_linear_triton(wide, linears, SCALE, case.drop, True)
    for unlike in ([fits] * 4, [fits, Adapted(case.weights[0], None, a[1:], b[:, 1:], STREAM)]):
        with pytest.raises(ValueError, match="up to 3 linears read one x"):
            lora_linear_reference(x, unlike, SCALE, case.drop)
    for wide, weight in ((extended, case.weights[0]), (extended[:, :-14], with_room(case.weights[0], case.spare))):
        with pytest.raises(ValueError, match="must hold R = 4 and weight must be"):
            lora_linear_triton(wide, [fits._replace(weight=weight)], SCALE, case.drop, True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize(("n_in", "n_out", "n"), [(4096, 4096, 3), (4096, 14336, 2), (14336, 4096, 1)])
def test_at_mistral_s_widths_on_the_gpu(n_in: int, n_out: int, n: int, dtype: torch.dtype) -> None:
    for n_tokens in (1, 1031):
        case = Case((n_tokens, n_in, n_out, 16), dtype, n=n)
        for function in (case.plain, case.spared):
            results = [function(*case.inputs) for _ in range(2)]
            assert torch.equal(*results)
            agree_over_long_sums(function, case.reference, case.inputs)
