"""The dropout's Triton face draws the reference's bits, every one of them."""

import pytest
import torch
from faces import DEVICE, TRITON_DTYPES, Clones, rounded
from torch import Tensor

from e5kernels.dropout import keyed_dropout_reference, signed
from e5kernels.dropout_triton import keyed_dropout_triton

STREAM = signed(0xFEDCBA9876543210)
EXTREME = [0, 5, -1, -(2**63), 2**63 - 1, 123456789]


def assert_same_bits(x: Tensor, keys: Tensor, stream: int, drop_below: int) -> None:
    expected = keyed_dropout_reference(x.float().cpu(), keys.cpu(), stream, drop_below)
    got = keyed_dropout_triton(x, keys, stream, drop_below)
    assert got.dtype == x.dtype and torch.equal(got, rounded(expected.to(DEVICE), x.dtype))


@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize("width", [1, 7, 8, 77, 513, 2049])
@pytest.mark.parametrize("drop_below", [0, 26, 200, 255])
def test_triton_equals_reference_to_the_bit(width: int, drop_below: int, dtype: torch.dtype) -> None:
    for n_tokens in (0, 1, 3):
        keys = torch.randint(-(2**63), 2**63 - 1, (n_tokens,)).to(DEVICE)
        assert_same_bits(torch.randn(n_tokens, width).to(DEVICE, dtype), keys, STREAM, drop_below)


@pytest.mark.parametrize("stream", [0, 1, 7, -1, 2**31, STREAM, -(2**63), 2**63 - 1])
def test_every_key_and_stream_draws_its_own_bits(stream: int) -> None:
    assert_same_bits(torch.ones(len(EXTREME), 21, device=DEVICE), torch.tensor(EXTREME, device=DEVICE), stream, 128)


@pytest.mark.parametrize("dtype", TRITON_DTYPES)
def test_every_layout_is_read_rightly(dtype: torch.dtype) -> None:
    keys, packed = torch.arange(18, device=DEVICE)[::2], torch.randn(9, 42).to(DEVICE, dtype)
    for x, n_clones in ((packed[:, 3:24], 1), (packed[:1, :21].expand(9, 21), 1), (packed[:, ::2], 2)):
        with Clones() as clones:
            keyed_dropout_triton(x, keys, STREAM, 77)
        assert not x.is_contiguous() and clones.n == n_clones  # one is the keys'
        assert_same_bits(x, keys, STREAM, 77)


@pytest.mark.parametrize("dtype", TRITON_DTYPES)
def test_what_is_dropped_is_zero_whatever_it_was(dtype: torch.dtype) -> None:
    keys = torch.arange(4, device=DEVICE)
    drawn = keyed_dropout_triton(torch.ones(4, 77).to(DEVICE, dtype), keys, STREAM, 128) > 0
    for value in (float("nan"), float("inf")):
        got = keyed_dropout_triton(torch.full((4, 77), value).to(DEVICE, dtype), keys, STREAM, 128)
        assert not got[~drawn].any() and not got[drawn].isfinite().any()


X, KEYS = torch.ones(4, 6), torch.arange(4)


@pytest.mark.parametrize(
    ("x", "keys", "drop_below"),
    [(X[0], KEYS, 5), (X, KEYS[:3], 5), (X, KEYS.int(), 5), (X, KEYS, 256), (X, KEYS, -1)],
)
def test_what_does_not_fit_is_refused(x: Tensor, keys: Tensor, drop_below: int) -> None:
    with pytest.raises(ValueError, match="x must be"):
        keyed_dropout_triton(x, keys, 1, drop_below)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize("width", [4096, 14336])
@pytest.mark.parametrize("n_tokens", [1, 1031])
def test_at_mistral_s_widths_on_the_gpu(n_tokens: int, width: int, dtype: torch.dtype) -> None:
    keys = torch.randint(-(2**63), 2**63 - 1, (n_tokens,)).to(DEVICE)
    assert_same_bits(torch.randn(n_tokens, width).to(DEVICE, dtype), keys, STREAM, 26)
