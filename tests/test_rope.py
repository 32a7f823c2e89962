"""Rotary positions turn each pair of channels, as a product of complex numbers does, and the gradient turns back."""

from collections.abc import Callable

import pytest
import torch
from faces import BUILT, DTYPES, assert_faces_agree, assert_threads_do_not_matter, wide, with_gradients
from tolerances import assert_fp64
from torch import Tensor

from e5kernels.rope import rope, rope_reference

FACES = [rope_reference, pytest.param(rope, marks=BUILT)]


def angles(n_tokens: int, head_dim: int) -> tuple[Tensor, Tensor]:
    turns = 10 * torch.randn(n_tokens, 1, head_dim // 2, dtype=torch.float64)
    return turns.cos(), turns.sin()


def by(function: type(rope), cos: Tensor, sin: Tensor) -> Callable[[Tensor], Tensor]:
    """The op with its angles as a function of x alone, whatever x's dtype; the angles are those of float32."""
    return lambda x: function(x, *(table.float().to(wide(x.dtype)) for table in (cos, sin)))


@pytest.mark.parametrize("function", FACES)
@pytest.mark.parametrize(("heads", "head_dim"), [(1, 2), (3, 6), (2, 40)])
def test_rope_is_a_product_of_complex_numbers(function: type(rope), heads: int, head_dim: int) -> None:
    x = torch.randn(5, heads, head_dim, dtype=torch.float64)
    cos, sin = angles(5, head_dim)
    turned = torch.complex(*x.split(head_dim // 2, dim=-1)) * torch.complex(cos, sin)
    assert_fp64(function(x, cos, sin), torch.cat([turned.real, turned.imag], -1))


@pytest.mark.parametrize("function", FACES)
def test_the_gradient_is_right_and_turns_back(function: type(rope)) -> None:
    x, (cos, sin) = torch.randn(3, 2, 6, dtype=torch.float64, requires_grad=True), angles(3, 6)
    assert torch.autograd.gradcheck(lambda x: function(x, cos, sin), (x,))
    out = function(x, cos, sin)
    assert_fp64(torch.autograd.grad(out, x, out.detach())[0], x.detach())


@BUILT
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [2, 6, 40, 64, 128, 256])
@pytest.mark.parametrize("heads", [1, 3])
def test_faces_agree(heads: int, head_dim: int, dtype: torch.dtype) -> None:
    for n_tokens in (0, 1, 19):
        tables = angles(n_tokens, head_dim)
        x = torch.randn(n_tokens, heads, head_dim).to(dtype)
        assert_faces_agree("rope", by(rope, *tables), by(rope_reference, *tables), [x])


@BUILT
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_layout_is_read_rightly(dtype: torch.dtype) -> None:
    packed = torch.randn(9, 7, 6).to(dtype)
    for x in (
        packed[:, 2:4],  # heads of one packed projection
        packed.transpose(0, 1).contiguous().transpose(0, 1),  # head by head
        packed.transpose(1, 2).contiguous().transpose(1, 2),  # channels apart
        packed[:, ::2],
        packed[:, :1].expand(-1, 4, -1),
        packed[:, :1].reshape(1, 9, 6).transpose(0, 1),  # one head: contiguous, with a stride that says nothing
    ):
        tables = [table.repeat(1, 1, 2)[..., ::2] for table in angles(9, 6)]
        assert_faces_agree("rope", by(rope, *tables), by(rope_reference, *tables), [x])


@BUILT
@pytest.mark.parametrize("heads", [1, 3])
def test_a_gradient_that_is_not_contiguous_is_read_rightly(heads: int) -> None:
    x, tables = torch.randn(9, heads, 6).double(), angles(9, 6)
    upstream = torch.randn(heads, 9, 6).double().transpose(0, 1)
    got, expected = (with_gradients(by(f, *tables), [x], upstream) for f in (rope, rope_reference))
    for ours, theirs in zip(got, expected, strict=True):
        assert_fp64(ours, theirs)


@BUILT
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_threads(dtype: torch.dtype) -> None:
    assert_threads_do_not_matter(by(rope, *angles(500, 40)), [torch.randn(500, 3, 40).to(dtype)])


@BUILT
def test_float16_goes_the_reference_s_way() -> None:
    x, tables = torch.randn(3, 2, 6).half(), angles(3, 6)
    assert torch.equal(by(rope, *tables)(x), by(rope_reference, *tables)(x))


X, TABLE = torch.ones(4, 2, 6), torch.ones(4, 1, 3)


@BUILT
@pytest.mark.parametrize(
    "change",
    [
        {"x": X[0]},
        {"x": X.half()},
        {"x": X.double()},
        {"x": torch.ones(4, 2, 7)},
        {"x": torch.ones(5, 2, 6)},
        {"x": torch.ones(4, 6, 2).transpose(1, 2)},
        {"cos": TABLE[:3], "sin": TABLE[:3]},
        {"cos": TABLE.double(), "sin": TABLE.double()},
        {"cos": TABLE.double()},
        {"sin": torch.ones(4, 1, 6)},
        {"sin": torch.ones(4, 1, 6)[..., ::2]},
    ],
)
def test_the_raw_op_refuses_what_it_cannot_read(change: dict) -> None:
    with pytest.raises(RuntimeError):
        torch.ops.e5kernels.rope(**({"x": X, "cos": TABLE, "sin": TABLE, "inverse": False} | change))


@BUILT
@pytest.mark.parametrize("inverse", [False, True])
def test_the_op_is_registered_soundly(inverse: bool) -> None:
    tables = [table.float() for table in angles(3, 6)]
    x = torch.randn(3, 5, 6)[:, 1:3].requires_grad_()
    torch.library.opcheck(torch.ops.e5kernels.rope.default, (x, *tables, inverse))
