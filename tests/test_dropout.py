"""The dropout's mask is splitmix64 of its keys, to the bit, in every face."""

import math

import numpy as np
import pytest
import torch
from faces import BUILT, DTYPES, threads
from torch import Tensor

from e5kernels.dropout import keyed_dropout, keyed_dropout_reference, mix, mix_tensor, signed

FACES = [keyed_dropout_reference, pytest.param(keyed_dropout, marks=BUILT)]
KEYS = [0, 5, -1, -(2**63), 2**63 - 1, 123456789]
STREAM = 0xFEDCBA9876543210


def splitmix64(state: int) -> int:
    """The published generator's output for a state before its step, by Python integers."""
    z = (state + 0x9E3779B97F4A7C15) % 2**64
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) % 2**64
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) % 2**64
    return z ^ z >> 31


def kept(key: int, channel: int, stream: int, drop_below: int) -> bool:
    word = splitmix64((((key ^ stream) % 2**64) + channel // 8 * 0x9E3779B97F4A7C15) % 2**64)
    return word.to_bytes(8, "little")[channel % 8] >= drop_below


def test_mix_is_splitmix64() -> None:
    state, outputs = 1234567, []
    for _ in range(3):
        outputs.append(mix(state))
        state = (state + 0x9E3779B97F4A7C15) % 2**64
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]  # published for this seed
    assert mix(0) == 0xE220A8397B1DCDAF
    values = [0, 1, -1, 2**62, -(2**63), 2**63 - 1]
    assert [v % 2**64 for v in mix_tensor(torch.tensor(values)).tolist()] == [splitmix64(v % 2**64) for v in values]


def test_signed_reads_64_bits() -> None:
    values = [0, 2**63 - 1, 2**63, 2**64 - 1, 2**64 + 5, -1]
    assert [signed(v) for v in values] == [0, 2**63 - 1, -(2**63), -1, 5, -1]


@pytest.mark.parametrize("function", FACES)
@pytest.mark.parametrize("stream", [0, STREAM, STREAM - 2**64, 7])
@pytest.mark.parametrize("drop_below", [0, 1, 77, 255])
def test_bits_are_splitmix64_of_the_key(function: type(keyed_dropout), stream: int, drop_below: int) -> None:
    width = 21
    got = function(torch.ones(len(KEYS), width, dtype=torch.float64), torch.tensor(KEYS), stream, drop_below)
    expected = [
        [256 / (256 - drop_below) * kept(key, channel, stream, drop_below) for channel in range(width)] for key in KEYS
    ]
    assert got.tolist() == expected


@pytest.mark.parametrize("function", FACES)
def test_bits_are_splitmix64_of_the_key_far_to_the_right(function: type(keyed_dropout)) -> None:
    got = function(torch.ones(2, 1543), torch.tensor([3, -9]), STREAM, 128)
    expected = [[2.0 * kept(key, channel, STREAM, 128) for channel in range(1543)] for key in (3, -9)]
    assert got.tolist() == expected


@BUILT
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 7, 8, 77, 512, 513, 576, 1543])
@pytest.mark.parametrize("drop_below", [0, 26, 200])
def test_faces_agree_to_the_bit(width: int, drop_below: int, dtype: torch.dtype) -> None:
    for n_tokens in (0, 1, 9):
        x, keys = torch.randn(n_tokens, width).to(dtype), torch.randint(-(2**63), 2**63 - 1, (n_tokens,))
        got, expected = (f(x, keys, STREAM, drop_below) for f in (keyed_dropout, keyed_dropout_reference))
        assert got.dtype == dtype and got.shape == x.shape and torch.equal(got, expected)


@BUILT
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_layout_is_read_rightly(dtype: torch.dtype) -> None:
    keys, packed = torch.arange(18)[::2], torch.randn(9, 40).to(dtype)
    for x in (packed[:, 3:24], packed[:, :21].T.contiguous().T, packed[:1, :21].expand(9, 21)):
        assert not x.is_contiguous()
        expected = keyed_dropout_reference(x.contiguous(), keys.contiguous(), STREAM, 77)
        assert torch.equal(keyed_dropout(x, keys, STREAM, 77), expected)


@BUILT
def test_bits_do_not_depend_on_threads() -> None:
    x, keys, results = torch.randn(1001, 77), torch.arange(1001), []
    for n in (1, 2, 3):
        with threads(n):
            results.append(keyed_dropout(x, keys, STREAM, 77))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("function", FACES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_dropped_is_zero_whatever_it_was(function: type(keyed_dropout), dtype: torch.dtype) -> None:
    drawn = function(torch.ones(9, 77).to(dtype), torch.arange(9), STREAM, 128) > 0
    for value in (float("nan"), float("inf")):
        got = function(torch.full((9, 77), value).to(dtype), torch.arange(9), STREAM, 128)
        assert not got[~drawn].any() and not got[drawn].isfinite().any()


@pytest.mark.parametrize("function", FACES)
def test_it_drops_its_share_independently(function: type(keyed_dropout)) -> None:
    keys = mix_tensor(torch.arange(4000))
    dropped = function(torch.ones(4000, 576), keys, mix(1), 26).numpy() == 0
    share = 26 / 256
    assert abs(dropped.mean() - share) < 5 * math.sqrt(share * (1 - share) / dropped.size)
    for axis in (0, 1):  # neighbours in position and in channel are dropped together no more often than by chance
        a, b = np.delete(dropped, 0, axis), np.delete(dropped, -1, axis)
        assert abs((a & b).mean() - share**2) < 5 * math.sqrt(share**2 / a.size)


@BUILT
def test_float16_goes_the_reference_s_way() -> None:
    x, keys = torch.randn(3, 7).half(), torch.arange(3)
    assert torch.equal(keyed_dropout(x, keys, 1, 77), keyed_dropout_reference(x, keys, 1, 77))


X, GOOD_KEYS = torch.ones(4, 6), torch.arange(4)


@BUILT
@pytest.mark.parametrize(
    ("x", "keys", "drop_below"),
    [
        (X[0], GOOD_KEYS, 5),
        (X.half(), GOOD_KEYS, 5),
        (torch.ones(6, 4).T, GOOD_KEYS, 5),
        (X, GOOD_KEYS[:3], 5),
        (X, GOOD_KEYS.int(), 5),
        (X, torch.arange(8)[::2], 5),
        (X, GOOD_KEYS, 256),
        (X, GOOD_KEYS, -1),
    ],
)
def test_the_raw_op_refuses_what_it_cannot_read(x: Tensor, keys: Tensor, drop_below: int) -> None:
    with pytest.raises(RuntimeError):
        torch.ops.e5kernels.keyed_dropout(x, keys, 1, drop_below)


@BUILT
def test_the_op_is_registered_soundly() -> None:
    torch.library.opcheck(torch.ops.e5kernels.keyed_dropout.default, (torch.randn(3, 21), torch.arange(3), 7, 77))
