"""How C++ ops and Triton faces are held against their reference: outputs and gradients, by the rule of the dtype."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from tolerances import assert_fp32, assert_fp64, assert_twice
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from e5kernels import attention, dropout, fp8, fp8_linear, last_token, lora_linear, native, rms_norm, rope, swiglu

BUILT = pytest.mark.skipif(
    not native.AVAILABLE, reason="the C++ ops are not built: `pip install -e .` with a C++ compiler builds them"
)
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
TRITON_DTYPES = [torch.float32, torch.bfloat16]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # of the Triton faces; the CPU is interpreted
Function = Callable[..., Tensor]


def bounds(lengths: Sequence[int]) -> Tensor:
    """Return cu_seqlens of sequences of these lengths: (N+1,) int32."""
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def qkv(
    n_tokens: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k, v as views of one packed projection, as a model makes them."""
    packed = torch.randn(n_tokens, heads + 2 * kv_heads, head_dim, dtype=torch.float64).to(dtype)
    return packed.split([heads, kv_heads, kv_heads], dim=1)


def wide(dtype: torch.dtype) -> torch.dtype:
    """Name the dtype that an op computes in."""
    return torch.promote_types(dtype, torch.float32)


def with_gradients(function: Function, inputs: Sequence[Tensor], upstream: Tensor) -> list[Tensor]:
    """Return function's output and the gradient of every input; inputs keep their strides."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream, materialize_grads=True)]


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float32 as a Triton kernel does here: the interpreter cuts bfloat16 off, a GPU takes the nearest."""
    if dtype != torch.bfloat16 or DEVICE.type == "cuda":
        return x.to(dtype)
    return (x.view(torch.int32) & -(1 << 16)).view(torch.float32).to(dtype)


def by_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run every op of a model by its Triton face, where there is no GPU by the interpreter."""
    for room in (attention, dropout, fp8, fp8_linear, last_token, lora_linear, rms_norm, rope, swiglu):
        monkeypatch.setattr(room, "face", lambda device: "triton")


def assert_spare_is_left(function: Callable[[int], Tensor], inputs: Sequence[Tensor], spare: int = 16) -> None:
    """Hold results and gradients with spare columns behind every row to those without, to the bit.

    function: of the number of spare columns.  Their own gradient is NaN, which may reach nothing.
    """
    plain, wide = function(0).flatten(1), function(spare)
    width = plain.shape[1]
    assert wide.shape == (len(plain), width + spare) and wide.is_contiguous()
    assert torch.equal(wide[:, :width], plain)
    g = torch.randn_like(plain)
    expected = torch.autograd.grad(plain, inputs, g)
    got = torch.autograd.grad(wide, inputs, torch.nn.functional.pad(g, (0, spare), value=torch.nan))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


class Clones(TorchDispatchMode):
    """Counts the tensors that are copied into another layout within a with block."""

    n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        self.n += func.overloadpacket is torch.ops.aten.clone
        return func(*args, **(kwargs or {}))


def assert_faces_agree(
    op: str, function: Function, reference: Function, inputs: Sequence[Tensor], is_triton: bool = False, rounds: int = 1
) -> None:
    """Hold function's output and gradients to those of the reference, computed in float64 from the same inputs.

    float32: the table of tolerances.py.  float64: 1e-12 norm-wise.  bfloat16: twice the reference's own error, which
    for Triton's interpreter is that of its rounding, `rounds` times where kernels read what kernels have rounded.
    """
    dtype = inputs[0].dtype
    with torch.no_grad():
        upstream = torch.randn(reference(*inputs).shape, dtype=torch.float64).to(inputs[0])
    got = with_gradients(function, inputs, upstream)
    assert all(x.dtype == dtype for x in got)
    expected = with_gradients(reference, [x.double() for x in inputs], upstream.double())
    if dtype == torch.bfloat16:
        same = with_gradients(reference, inputs, upstream)
        if is_triton and DEVICE.type == "cpu":
            wide_same = with_gradients(reference, [x.float() for x in inputs], upstream.float())
            same = [rounded(x, dtype) for x in wide_same]
        for ours, theirs, truth in zip(got, same, expected, strict=True):
            if truth.numel():
                assert_twice(ours, theirs, truth.float(), rounds if is_triton and DEVICE.type == "cpu" else 1)
    for ours, truth in zip(got, expected, strict=True):
        assert ours.shape == truth.shape
        if dtype == torch.float64:
            assert_fp64(ours, truth)
        elif dtype == torch.float32:
            assert_fp32(op, ours, truth.float())


@contextmanager
def threads(n: int) -> Iterator[None]:
    """Run torch, and with it the C++ ops, on n threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    yield
    torch.set_num_threads(before)


def assert_threads_do_not_matter(function: Function, inputs: Sequence[Tensor]) -> None:
    """Hold output and gradients to the same bits on 1, 2, 3 and again 2 threads."""
    upstream, results = torch.randn_like(function(*inputs)), []
    for n in (1, 2, 3, 2):
        with threads(n):
            results.append(with_gradients(function, inputs, upstream))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
