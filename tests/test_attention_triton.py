"""Attention's Triton face equals its reference: every length, window, group and width, and bounds of keys apart."""

from functools import partial

import pytest
import torch
from faces import DEVICE, TRITON_DTYPES, Clones, assert_faces_agree, assert_spare_is_left, bounds, qkv, with_gradients
from tolerances import assert_fp32
from torch import Tensor

from e5kernels.attention import face, varlen_attention_reference
from e5kernels.attention_triton import block_table, tile_of, varlen_attention_triton

agree = partial(assert_faces_agree, "attention", is_triton=True, rounds=2)  # backward reads the rounded output
BF16 = torch.bfloat16
on_device = partial(torch.Tensor.to, device=DEVICE)


def by(lengths: list[int], **settings: float | bool | Tensor | None) -> tuple[partial, partial]:
    """Both faces as functions of q, k and v."""
    shared = {"cu_seqlens": on_device(bounds(lengths)), "scale": 0.4} | settings
    return tuple(partial(f, **shared) for f in (varlen_attention_triton, varlen_attention_reference))


def packed(*shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [on_device(x) for x in qkv(*shape, dtype)]


@pytest.mark.parametrize(
    ("lengths", "window", "causal", "dtype"),
    [
        ([], None, True, BF16),
        ([1], None, True, torch.float32),
        ([1, 1, 70], None, True, BF16),
        ([1, 1, 36], None, True, torch.float32),
        ([16, 1, 34], None, False, torch.float32),
        ([0, 3, 0], 2, True, BF16),
        ([33, 5], 1, True, torch.float32),
        ([66], 40, True, BF16),
        ([60], 18, True, torch.float32),
        ([9, 40], 5, False, BF16),
        ([4, 40], 5, False, torch.float32),
    ],
)
def test_every_length_and_window(lengths: list[int], window: int | None, causal: bool, dtype: torch.dtype) -> None:
    agree(*by(lengths, window=window, causal=causal), packed(sum(lengths), 1, 1, 24, dtype=dtype))


@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize(("heads", "head_dim"), [((1, 1), 2), ((2, 2), 16), ((3, 1), 40), ((2, 1), 128), ((1, 1), 256)])
def test_every_head_dim_and_group(heads: tuple[int, int], head_dim: int, dtype: torch.dtype) -> None:
    agree(*by([1, 18], window=9, scale=head_dim**-0.5), packed(19, *heads, head_dim, dtype=dtype))


@pytest.mark.parametrize(("window", "causal"), [(None, True), (5, False)])
def test_queries_are_the_last_tokens_where_keys_have_bounds_of_their_own(window: int | None, causal: bool) -> None:
    q_lengths, k_lengths = [1, 3, 0, 33], [1, 9, 5, 50]
    kept = torch.cat([torch.arange(n) >= n - m for m, n in zip(q_lengths, k_lengths, strict=True)])
    q, k, v = packed(sum(k_lengths), 2, 1, 6)
    upstream = torch.randn(q.shape, device=DEVICE) * kept[:, None, None].to(DEVICE)
    settings = {"window": window, "causal": causal}
    _, everything = by(k_lengths, **settings)
    out, *expected = with_gradients(everything, [x.double() for x in (q, k, v)], upstream.double())
    some, _ = by(q_lengths, cu_seqlens_k=on_device(bounds(k_lengths)), **settings)
    got = with_gradients(some, (q[kept], k, v), upstream[kept])
    for ours, theirs in zip(got, (out[kept], expected[0][kept], *expected[1:]), strict=True):
        assert_fp32("attention", ours, theirs.float())


@pytest.mark.parametrize("dtype", TRITON_DTYPES)
def test_spare_columns_are_left_alone(dtype: torch.dtype) -> None:
    inputs = [x.clone().requires_grad_() for x in packed(37, 2, 1, 6, dtype=dtype)]
    for function in by([1, 33, 0, 3], window=9):
        assert_spare_is_left(lambda spare, f=function: f(*inputs, spare=spare), inputs)


def test_heads_of_a_packed_projection_are_read_where_they_lie() -> None:
    ours, _ = by([15])
    with torch.no_grad(), Clones() as clones:
        ours(*packed(15, 2, 2, 6))
    assert clones.n == 0


@pytest.mark.parametrize(("dtype", "apart"), [(torch.float32, 0), (BF16, 1), (torch.float32, 2)])
def test_every_other_layout_is_read_rightly(dtype: torch.dtype, apart: int) -> None:
    inputs = packed(15, 2, 2, 6, dtype=dtype)
    if apart == 0:
        inputs = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in inputs]  # head by head
    elif apart == 1:
        inputs = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]  # channels apart
    else:
        inputs = [x[:, :1].expand(-1, 2, -1) for x in inputs]  # heads that share memory
    assert not any(x.is_contiguous() for x in inputs)
    agree(*by([15]), inputs)


def test_a_gradient_that_is_not_contiguous_is_read_rightly() -> None:
    inputs, upstream = packed(9, 2, 1, 6), torch.randn(6, 9, 2, device=DEVICE).permute(1, 2, 0)
    for ours, theirs in zip(*(with_gradients(f, inputs, upstream) for f in by([9])), strict=True):
        assert_fp32("attention", ours, theirs)


def test_scores_of_ten_thousand_neither_overflow_nor_blur() -> None:
    q, k, v = packed(44, 1, 1, 6)
    q, k = ((torch.randint(-1, 2, (44, 1, 1)) * 100.0 * torch.eye(6)[:1]).to(DEVICE) for _ in range(2))
    assert (q[:, 0] @ k[:, 0].T).abs().max() == 10_000
    ours, reference = by([35, 9], scale=1.0)
    out, *gradients = with_gradients(ours, (q, k, v), torch.ones_like(v))
    assert all(x.isfinite().all() for x in gradients)
    assert_fp32("attention", out, reference(*(x.double() for x in (q, k, v))).float())


@pytest.mark.parametrize(("broken", "dtype"), [(0, torch.float32), (1, BF16)])  # q, k
def test_nan_reaches_what_sees_it_and_nothing_else(broken: int, dtype: torch.dtype) -> None:
    inputs = [x.clone() for x in packed(70, 1, 1, 6, dtype=dtype)]
    inputs[broken][40, 0] = float("nan")
    ours, _ = by([30, 30, 10])
    out, *gradients = with_gradients(ours, inputs, torch.ones_like(inputs[0]))
    hit = torch.zeros(70, dtype=torch.bool, device=DEVICE)
    hit[40 : 41 if broken == 0 else 60] = True
    assert torch.equal(out[:, 0].isnan().all(-1), hit) and torch.equal(out[:, 0].isnan().any(-1), hit)
    assert all(x[40].isnan().any() for x in gradients)
    assert not any(x[:30].isnan().any() or x[60:].isnan().any() for x in gradients)


def test_a_text_alone_gives_the_bits_that_it_gives_in_a_pack() -> None:
    lengths = [3, 35, 1]
    inputs, upstream = packed(39, 1, 1, 6), torch.randn(39, 1, 6, device=DEVICE)
    in_pack = with_gradients(by(lengths, window=20)[0], inputs, upstream)
    alone = by([35], window=20)[0]
    # in memory of its own, as a text alone lies: by their alignment Triton lays rows out, and so orders their sums
    own = with_gradients(alone, [x[3:38].clone() for x in inputs], upstream[3:38].clone())
    assert all(torch.equal(a, b[3:38]) for a, b in zip(own, in_pack, strict=True))


@pytest.mark.parametrize("lengths", [[1], [0], [7, 0, 64, 65, 1], [63] * 5 + [129, 1, 1], [300, 2]])
@pytest.mark.parametrize("block", [16, 64])
def test_every_block_has_a_slot_and_every_slot_a_sequence(lengths: list[int], block: int) -> None:
    cu_seqlens, table = bounds(lengths).tolist(), block_table(on_device(bounds(lengths)), sum(lengths), block)
    assert table.numel() == sum(lengths) // block + len(lengths)
    blocks = []
    for slot, sequence in enumerate(table.tolist()):
        place = slot - cu_seqlens[sequence] // block - sequence
        if place * block < lengths[sequence]:
            blocks.append((sequence, place))
    assert blocks == [(n, place) for n, length in enumerate(lengths) for place in range(-(-length // block))]


def test_attention_on_cuda_runs_by_triton() -> None:
    assert face(torch.device("cuda", 1)) == "triton"


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("head_dim", [1, 16, 40, 96, 128, 200, 256])
def test_a_tile_holds_the_head_and_fits_tensor_cores(head_dim: int, itemsize: int) -> None:
    for kernel in ("forward", "d_q", "d_kv"):
        tile = tile_of(kernel, head_dim, itemsize)
        assert tile["BLOCK_D"] >= head_dim and min(tile["BLOCK_D"], tile["BLOCK_Q"], tile["BLOCK_K"]) >= 16


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize("window", [None, 100])
def test_at_mistral_s_heads_on_the_gpu(window: int | None, dtype: torch.dtype) -> None:
    lengths = [1, 1, 1031, 0, 128, 333]
    agree(*by(lengths, window=window, scale=128**-0.5), packed(sum(lengths), 32, 8, 128, dtype=dtype))


@pytest.mark.gpu
def test_the_gradients_have_the_same_bits_every_time_on_the_gpu() -> None:
    inputs = packed(1160, 32, 8, 128, dtype=BF16)
    first, second = (with_gradients(by([1031, 1, 128])[0], inputs, inputs[0]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
