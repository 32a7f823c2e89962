"""Rope's Triton face equals its reference in both directions, whatever layout q, k and their gradients come in."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from faces import DEVICE, TRITON_DTYPES, Clones, assert_faces_agree, wide, with_gradients
from tolerances import assert_fp32
from torch import Tensor

from e5kernels import rope_triton as room
from e5kernels.rope import rope, rope_reference
from e5kernels.rope_triton import rope_triton

agree = partial(assert_faces_agree, "rope", is_triton=True)


def angles(n_tokens: int, head_dim: int) -> tuple[Tensor, Tensor]:
    turns = 10 * torch.randn(n_tokens, 1, head_dim // 2, dtype=torch.float64, device=DEVICE)
    return turns.cos(), turns.sin()


def by(function: type(rope), cos: Tensor, sin: Tensor) -> Callable[[Tensor], Tensor]:
    """The op with its angles as a function of x alone, whatever x's dtype; the angles are those of float32."""
    return lambda x: function(x, *(table.float().to(wide(x.dtype)) for table in (cos, sin)))


@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize("head_dim", [2, 6, 40, 128])
@pytest.mark.parametrize("heads", [1, 3, 8])
def test_triton_equals_reference(heads: int, head_dim: int, dtype: torch.dtype) -> None:
    for n_tokens in (0, 1, 5):
        tables = angles(n_tokens, head_dim)
        x = torch.randn(n_tokens, heads, head_dim).to(DEVICE, dtype)
        agree(by(rope_triton, *tables), by(rope_reference, *tables), [x])


@pytest.mark.parametrize("tile", [1, 16])
def test_more_heads_than_a_program_takes(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "TILE", tile)
    tables = angles(3, 6)
    agree(by(rope_triton, *tables), by(rope_reference, *tables), [torch.randn(3, 7, 6, device=DEVICE)])


def test_the_gradient_turns_back() -> None:
    x, tables = torch.randn(5, 3, 40, device=DEVICE), angles(5, 40)
    turned = by(rope_triton, *tables)(x)
    assert_fp32("rope", with_gradients(by(rope_triton, *tables), [x], turned)[1], x)


@pytest.mark.parametrize("dtype", TRITON_DTYPES)
def test_every_layout_is_read_where_it_lies(dtype: torch.dtype) -> None:
    packed = torch.randn(5, 7, 6).to(DEVICE, dtype)
    tables = [table.float() for table in angles(5, 6)]
    for x in (
        packed[:, 2:4],  # heads of one packed projection
        packed.transpose(0, 1).contiguous().transpose(0, 1),  # head by head
        packed.transpose(1, 2).contiguous().transpose(1, 2),  # channels apart
        packed[:, ::2],
        packed[:, :1].expand(-1, 4, -1),
    ):
        with Clones() as clones:
            y = rope_triton(x.detach().requires_grad_(), *tables)
            torch.autograd.grad(y, y.grad_fn.next_functions[0][0].variable, x)
        assert not x.is_contiguous() and clones.n == 0
        agree(by(rope_triton, *tables), by(rope_reference, *tables), [x])


def test_a_gradient_that_is_not_contiguous_is_read_rightly() -> None:
    x, tables = torch.randn(5, 3, 6, device=DEVICE), angles(5, 6)
    upstream = torch.randn(3, 5, 6, device=DEVICE).transpose(0, 1)
    pairs = zip(*(with_gradients(by(f, *tables), [x], upstream) for f in (rope_triton, rope_reference)), strict=True)
    for ours, theirs in pairs:
        assert_fp32("rope", ours, theirs)


X, TABLE = torch.ones(4, 2, 6), torch.ones(4, 1, 3)


@pytest.mark.parametrize(
    "change",
    [
        {"x": X[0]},
        {"x": torch.ones(())},
        {"x": torch.ones(4, 2, 7)},
        {"x": torch.ones(5, 2, 6)},
        {"cos": TABLE[:3], "sin": TABLE[:3]},
        {"cos": TABLE[:1], "sin": TABLE[:1]},
        {"cos": TABLE.double()},
        {"sin": torch.ones(4, 1, 6)},
    ],
)
def test_angles_that_do_not_fit_are_refused(change: dict) -> None:
    with pytest.raises(ValueError, match="x must be"):
        rope_triton(**({"x": X, "cos": TABLE, "sin": TABLE} | change))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize("n_tokens", [1, 1031])
def test_at_mistral_s_heads_on_the_gpu(n_tokens: int, dtype: torch.dtype) -> None:
    packed, tables = torch.randn(n_tokens, 48, 128, device=DEVICE).to(dtype), angles(n_tokens, 128)
    for x in (packed[:, :32], packed[:, 32:40]):
        agree(by(rope_triton, *tables), by(rope_reference, *tables), [x])
