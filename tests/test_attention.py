"""Packed attention is the softmax over each sequence's own keys, in every face, dtype, window and packing."""

import math
from functools import partial

import pytest
import torch
from faces import (
    BUILT,
    DTYPES,
    assert_faces_agree,
    assert_spare_is_left,
    assert_threads_do_not_matter,
    bounds,
    qkv,
    with_gradients,
)
from tolerances import assert_fp32, assert_fp64
from torch import Tensor

from e5kernels.attention import varlen_attention, varlen_attention_reference

FACES = [varlen_attention_reference, pytest.param(varlen_attention, marks=BUILT)]


def definition(
    q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float, window: int | None, causal: bool
) -> Tensor:
    """Sum over the keys that each query sees, by loops."""
    out, start = torch.zeros_like(q), 0
    for length in lengths:
        for i in range(length):
            near = [j for j in range(length) if window is None or abs(i - j) < window]
            keys = [start + j for j in near if j <= i or not causal]
            for head in range(q.shape[1]):
                kv_head = head * k.shape[1] // q.shape[1]
                scores = (k[keys, kv_head] @ q[start + i, head]) * scale
                weights = (scores - scores.max()).exp()
                out[start + i, head] = (weights / weights.sum()) @ v[keys, kv_head]
        start += length
    return out


@pytest.mark.parametrize("function", FACES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 5, 100])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_is_the_definition(
    function: type(varlen_attention), causal: bool, window: int | None, kv_heads: int
) -> None:
    lengths = [1, 1, 12, 3]
    q, k, v = qkv(sum(lengths), 4, kv_heads, 6)
    got = function(q, k, v, bounds(lengths), scale=0.3, window=window, causal=causal)
    assert_fp64(got, definition(q, k, v, lengths, 0.3, window, causal))


@pytest.mark.parametrize("function", FACES)
@pytest.mark.parametrize(("window", "causal"), [(None, True), (2, True), (None, False), (2, False)])
def test_the_gradient_is_right(function: type(varlen_attention), window: int | None, causal: bool) -> None:
    q, k, v = qkv(5, 4, 2, 2)
    leaves = [x.clone().requires_grad_() for x in (q[1:], k, v)]
    call = partial(function, cu_seqlens=bounds([1, 3]), cu_seqlens_k=bounds([2, 3]), scale=0.7)
    assert torch.autograd.gradcheck(partial(call, window=window, causal=causal), leaves)


@pytest.mark.parametrize("function", FACES)
def test_spare_columns_are_left_alone(function: type(varlen_attention)) -> None:
    inputs = [x.clone().requires_grad_() for x in qkv(5, 4, 2, 2)]
    assert_spare_is_left(lambda spare: function(*inputs, bounds([2, 3]), scale=0.7, spare=spare), inputs)


def compare(
    lengths: list[int], heads: tuple[int, int], head_dim: int, window: int | None, causal: bool, dtype: torch.dtype
) -> None:
    settings = {"cu_seqlens": bounds(lengths), "scale": head_dim**-0.5, "window": window, "causal": causal}
    function, reference = (partial(f, **settings) for f in (varlen_attention, varlen_attention_reference))
    assert_faces_agree("attention", function, reference, qkv(sum(lengths), *heads, head_dim, dtype))


@BUILT
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 5, 70, 1000])
@pytest.mark.parametrize("lengths", [[], [1], [1, 1, 7], [1, 1, 130], [64], [65], [0, 3, 0]])
def test_every_length_and_window(lengths: list[int], window: int | None, causal: bool, dtype: torch.dtype) -> None:
    compare(lengths, (3, 1), 6, window, causal, dtype)


@BUILT
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [2, 6, 40, 64, 128, 256])
@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (3, 1), (8, 2)])
def test_every_head_dim_and_group(heads: tuple[int, int], head_dim: int, dtype: torch.dtype) -> None:
    compare([1, 67, 5], heads, head_dim, 66, True, dtype)


@BUILT
@pytest.mark.parametrize(("window", "dtype"), [(None, torch.float32), (None, torch.bfloat16), (1000, torch.float32)])
def test_a_text_of_4096_tokens(window: int | None, dtype: torch.dtype) -> None:
    compare([4096], (2, 1), 8, window, True, dtype)


@pytest.mark.parametrize("function", FACES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 5, 70])
def test_queries_are_the_last_tokens_where_keys_have_bounds_of_their_own(
    function: type(varlen_attention), window: int | None, causal: bool
) -> None:
    q_lengths, k_lengths = [1, 3, 0, 65, 7], [1, 9, 5, 130, 7]
    q, k, v = qkv(sum(k_lengths), 4, 2, 6)
    kept = torch.cat([torch.arange(n) >= n - m for m, n in zip(q_lengths, k_lengths, strict=True)])
    upstream = torch.zeros_like(q)
    upstream[kept] = torch.randn(sum(q_lengths), 4, 6, dtype=torch.float64)
    settings = {"scale": 0.3, "window": window, "causal": causal}
    everything = partial(varlen_attention_reference, cu_seqlens=bounds(k_lengths), **settings)
    out, dq, dk, dv = with_gradients(everything, (q, k, v), upstream)
    some = partial(function, cu_seqlens=bounds(q_lengths), cu_seqlens_k=bounds(k_lengths), **settings)
    got = with_gradients(some, (q[kept], k, v), upstream[kept])
    for ours, expected in zip(got, (out[kept], dq[kept], dk, dv), strict=True):
        assert_fp64(ours, expected)


@BUILT
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_layout_is_read_rightly(dtype: torch.dtype) -> None:
    for inputs in (
        [x.transpose(0, 1).contiguous().transpose(0, 1) for x in qkv(70, 4, 2, 6, dtype)],  # head by head
        [x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv(70, 4, 2, 6, dtype)],  # channels apart
        [x[:, :1].expand(-1, 4, -1) for x in qkv(70, 4, 2, 6, dtype)],  # heads that share memory
    ):
        assert not any(x.is_contiguous() for x in inputs)
        settings = {"cu_seqlens": torch.stack([bounds([3, 67])] * 2, 1)[:, 0], "scale": 0.4}
        function, reference = (partial(f, **settings) for f in (varlen_attention, varlen_attention_reference))
        assert_faces_agree("attention", function, reference, inputs)


@BUILT
def test_a_gradient_that_is_not_contiguous_is_read_rightly() -> None:
    inputs, settings = qkv(9, 4, 2, 6, torch.float32), {"cu_seqlens": bounds([9]), "scale": 0.4}
    upstream = torch.randn(6, 9, 4).permute(1, 2, 0)
    got = with_gradients(partial(varlen_attention, **settings), inputs, upstream)
    expected = with_gradients(partial(varlen_attention_reference, **settings), inputs, upstream)
    for ours, theirs in zip(got, expected, strict=True):
        assert_fp32("attention", ours, theirs)


@pytest.mark.parametrize("function", FACES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_of_ten_thousand_neither_overflow_nor_blur(function: type(varlen_attention), dtype: torch.dtype) -> None:
    lengths, n = [70, 9], 79
    q, k = (torch.randint(-1, 2, (n, 2, 1)).to(dtype) * 100 * torch.eye(6, dtype=dtype)[:1] for _ in range(2))
    v = torch.randn(n, 2, 6, dtype=dtype)
    assert (q[:, 0] @ k[:, 0].T).abs().max() == 10_000
    settings = {"cu_seqlens": bounds(lengths), "scale": 1.0}
    got = with_gradients(partial(function, **settings), (q, k, v), torch.ones_like(v))
    expected = definition(*(x.double() for x in (q, k, v)), lengths, 1.0, None, True)
    assert all(x.isfinite().all() for x in got)
    assert_fp32("attention", got[0].float(), expected.float())


@BUILT
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_reaches_what_sees_it_and_nothing_else(dtype: torch.dtype) -> None:
    for broken in range(2):  # q, then k
        inputs = [x.clone() for x in qkv(140, 2, 1, 6, dtype)]
        inputs[broken][100, 0] = float("nan")
        settings = {"cu_seqlens": bounds([70, 60, 10]), "scale": 0.4}
        out, *gradients = with_gradients(partial(varlen_attention, **settings), inputs, torch.ones_like(inputs[0]))
        hit = torch.zeros(140, dtype=torch.bool)
        hit[100 : 101 if broken == 0 else 130] = True
        assert torch.equal(out[:, 0].isnan().all(-1), hit) and torch.equal(out[:, 0].isnan().any(-1), hit)
        assert all(x[100].isnan().any() for x in gradients)
        assert not any(x[:70].isnan().any() or x[130:].isnan().any() for x in gradients)


@BUILT
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_text_alone_gives_the_bits_that_it_gives_in_a_pack(dtype: torch.dtype) -> None:
    lengths = [3, 130, 1, 67, 1]
    q, k, v = qkv(sum(lengths), 6, 2, 40, dtype)
    upstream = torch.randn(sum(lengths), 6, 40).to(dtype)
    call = partial(varlen_attention, scale=0.2, window=70)
    packed = with_gradients(partial(call, cu_seqlens=bounds(lengths)), (q, k, v), upstream)
    pieces = [x.split(lengths) for x in (q, k, v, upstream, *packed)]
    for n, (*inputs, weights, out, dq, dk, dv) in zip(lengths, zip(*pieces, strict=True), strict=True):
        alone = with_gradients(partial(call, cu_seqlens=bounds([n])), inputs, weights)
        assert all(torch.equal(a, b) for a, b in zip(alone, (out, dq, dk, dv), strict=True))


@BUILT
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_threads(dtype: torch.dtype) -> None:
    lengths = [130, 1, 67, 200, 5]
    call = partial(varlen_attention, cu_seqlens=bounds(lengths), scale=0.2, window=150)
    assert_threads_do_not_matter(call, qkv(sum(lengths), 6, 2, 40, dtype))


@BUILT
def test_float16_goes_the_reference_s_way() -> None:
    q, k, v = qkv(5, 4, 2, 6, torch.float16)
    settings = {"cu_seqlens": bounds([2, 3]), "scale": 0.3}
    assert torch.equal(varlen_attention(q, k, v, **settings), varlen_attention_reference(q, k, v, **settings))


Q, KV, BOUNDS = torch.ones(4, 2, 8), torch.ones(4, 1, 8), bounds([1, 3])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": Q[0]}, r"q must be \(Tq, H, head_dim\)"),
        ({"k": KV[:, 0]}, r"q must be \(Tq, H, head_dim\)"),
        ({"v": KV[:3]}, r"\(Tk, K, head_dim\)"),
        ({"q": Q[..., :6]}, r"\(Tk, K, head_dim\)"),
        ({"q": Q[:, :1], "k": torch.ones(4, 2, 8), "v": torch.ones(4, 2, 8)}, "multiple of the key heads: got 1, 2"),
        ({"k": KV[:, :0], "v": KV[:, :0]}, "multiple of the key heads: got 2, 0"),
        ({"v": KV.double()}, "one dtype"),
        ({"window": 0}, "window must be at least 1"),
        ({"cu_seqlens": bounds([1, 2])}, "cu_seqlens must rise from 0 to 4"),
        ({"cu_seqlens": bounds([1, 4])}, "cu_seqlens must rise from 0 to 4"),
        ({"cu_seqlens": torch.tensor([1, 2, 4], dtype=torch.int32)}, "cu_seqlens must rise from 0 to 4"),
        ({"cu_seqlens": torch.tensor([0, 5, 4], dtype=torch.int32)}, "cu_seqlens must rise from 0 to 4"),
        ({"cu_seqlens": BOUNDS.long()}, r"cu_seqlens must be \(N\+1,\) int32"),
        ({"cu_seqlens": BOUNDS[None]}, r"cu_seqlens must be \(N\+1,\) int32"),
        ({"cu_seqlens": BOUNDS[:0]}, r"cu_seqlens must be \(N\+1,\) int32"),
        ({"cu_seqlens_k": bounds([4])}, r"cu_seqlens_k must be \(N\+1,\) int32"),
        ({"cu_seqlens_k": bounds([2, 3])}, "cu_seqlens_k must rise from 0 to 4"),
        ({"cu_seqlens_k": bounds([2, 2])}, "at least as many keys as queries"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict, message: str) -> None:
    good = {"q": Q, "k": KV, "v": KV, "cu_seqlens": BOUNDS, "scale": 1.0}
    with pytest.raises(ValueError, match=message):
        varlen_attention(**(good | change))


RAW = {"q": Q, "k": KV, "v": KV, "cu_q": BOUNDS, "cu_k": BOUNDS, "scale": 1.0, "window": 0, "causal": True}


@BUILT
@pytest.mark.parametrize(
    "change",
    [
        {"q": Q[0]},
        {"q": Q.half()},
        {"q": Q.transpose(1, 2).contiguous().transpose(1, 2)},
        {"k": KV[..., :6]},
        {"v": KV[:3]},
        {"v": KV.double()},
        {"k": KV[:, :0], "v": KV[:, :0]},
        {"k": Q.repeat(1, 2, 1), "v": Q.repeat(1, 2, 1)},
        {"cu_q": BOUNDS.long()},
        {"cu_q": BOUNDS[:0], "cu_k": BOUNDS[:0]},
        {"cu_k": bounds([4])},
        {"cu_k": bounds([1, 4])},
        {"cu_q": bounds([1, 2])},
        {"cu_q": torch.tensor([0, 5, 4], dtype=torch.int32)},
        {"cu_k": torch.tensor([0, 5, 4], dtype=torch.int32)},
        {"cu_k": torch.tensor([-1, 1, 4], dtype=torch.int32)},
    ],
)
def test_the_raw_forward_refuses_what_it_cannot_read(change: dict) -> None:
    with pytest.raises(RuntimeError):
        torch.ops.e5kernels.varlen_attention_forward(**(RAW | change))


@BUILT
@pytest.mark.parametrize(
    "change",
    [
        {"d_out": Q[:3]},
        {"d_out": Q.double()},
        {"d_out": Q[0]},
        {"d_out": Q.transpose(1, 2).contiguous().transpose(1, 2)},
        {"out": Q[:, :1]},
        {"lse": torch.ones(3, 2)},
        {"lse": torch.ones(4, 2).double()},
        {"lse": torch.ones(2, 4).T},
        {"cu_q": bounds([1, 4])},
    ],
)
def test_the_raw_backward_refuses_what_it_cannot_read(change: dict) -> None:
    good = RAW | {"d_out": Q, "out": Q, "lse": torch.ones(4, 2)}
    assert len(torch.ops.e5kernels.varlen_attention_backward(**good)) == 3
    with pytest.raises(RuntimeError):
        torch.ops.e5kernels.varlen_attention_backward(**(good | change))


@BUILT
def test_a_query_without_keys_gets_zeros_and_gives_none() -> None:
    arguments = RAW | {"cu_q": bounds([3, 1]), "cu_k": bounds([1, 3])}  # the public function refuses this
    out, lse = torch.ops.e5kernels.varlen_attention_forward(**arguments)
    assert not out[:2].any() and (lse[:2] == -math.inf).all() and (out[2:] == 1).all()
    gradients = torch.ops.e5kernels.varlen_attention_backward(**arguments, d_out=Q, out=out, lse=lse)
    assert all(x.isfinite().all() for x in gradients)


@BUILT
def test_ops_are_registered_soundly() -> None:
    q, k, v = (x.clone().requires_grad_() for x in qkv(7, 4, 2, 6, torch.float32))
    rest = bounds([3, 4]), bounds([3, 4]), 0.3, 3, True
    torch.library.opcheck(torch.ops.e5kernels.varlen_attention_forward.default, (q, k, v, *rest))
    q, k, v = q.detach(), k.detach(), v.detach()
    out, lse = torch.ops.e5kernels.varlen_attention_forward(q, k, v, *rest)
    arguments = torch.randn_like(out), q, k, v, out, lse, *rest
    torch.library.opcheck(torch.ops.e5kernels.varlen_attention_backward.default, arguments)
