"""Rows in fp8: e4m3 with one fp32 scale a row (arXiv 2209.05433), alone and fused into what writes the rows.

    amax = max(max |x|, 448 * 2^-126),  scale = amax / 448,  q = e4m3(x * (448 / amax)),  x ~ q * scale

e4m3 has a sign, 4 bits of exponent and 3 of mantissa; it ends at 448 and has no infinity. A row of zeros has q = 0 and
the least scale, 2^-126, so that no division is by 0 and no scale is subnormal. Nothing that is not finite becomes
finite: a NaN or an infinity in a row makes its scale the same, so that the whole row, taken back, is not finite.

x: (..., K) any float dtype.  q: (..., K) e4m3.  scale: (..., 1) fp32.  Bytes, of e each element of x, for N elements:
(e + 1) N; fused into what writes x: N more than without, since x (T, K) is written too: the adapters' z = d(x) A^T
reads it, and all gradients of x flow through it.
"""

import sys
from typing import NamedTuple

import torch
from torch import Tensor

from e5kernels import native
from e5kernels.rms_norm import add_rms_norm
from e5kernels.swiglu import geglu, swiglu

if sys.platform == "linux":  # Triton is published for no other
    from e5kernels.fp8_triton import add_rms_norm_rows_triton, glu_rows_triton, quantise_rows_triton

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
LEAST_AMAX = LARGEST * 2.0**-126


class Rows(NamedTuple):
    """Activations and what products in fp8 read of them; linears that share an input share its quantisation.

    x: (T, K), through which gradients flow.  q: (T, K) e4m3 on CUDA; elsewhere its values in max(fp32, x's dtype), so
    that the reference decodes them once.  scale: (T, 1) fp32.  Both None where no product reads them.
    """

    x: Tensor
    q: Tensor | None
    scale: Tensor | None

    def gathered(self, x: Tensor, rows: Tensor) -> "Rows":
        """Keep some rows, of which x (N, K) holds the activations.  rows: (N,) int64."""
        q = self.q.view(torch.uint8).index_select(0, rows).view(E4M3) if self.q.dtype == E4M3 else self.q[rows]
        return Rows(x, q, self.scale.index_select(0, rows))


def quantise_rows_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise rows by plain torch; the definition.  Arguments and result as `quantise_rows`."""
    wide = x.float()
    amax = wide.abs().amax(-1, keepdim=True).clamp(min=LEAST_AMAX)
    largest = torch.full_like(amax, LARGEST)  # with a number for it torch multiplies by a reciprocal: rounded twice
    scaled = wide * (largest / amax)
    # torch's cast takes an infinity to 448, or to NaN, by its release; none reaches it, since inf * 0 is NaN.
    return scaled.to(E4M3), amax / largest


def face(device: torch.device) -> str:
    """Name the face that this room uses on a device: "triton" on CUDA under Linux, else "reference"."""
    return "triton" if device.type == "cuda" and sys.platform == "linux" else "reference"


def multiplies_codes(device: torch.device) -> bool:
    """Say whether products on a device read codes as they are; elsewhere they read what these stand for."""
    return device.type == "cuda"


@torch.no_grad()
def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise the last dimension.  x: (..., K), K > 0.  Returns q (..., K) e4m3 and scale (..., 1) fp32."""
    if face(x.device) == "triton" and native.takes(x):
        return quantise_rows_triton(x)
    return quantise_rows_reference(x)


def values(q: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the numbers that e4m3 codes stand for, exactly, in fp32 or fp64.

    By a table of all 256: on a CPU that is 3 to 4 times as fast as torch's cast (0.79 and 0.21 G elements/s, one AVX512
    thread, torch 2.13).
    """
    if q.device.type != "cpu":
        return q.to(dtype)
    table = torch.arange(256, dtype=torch.uint8).view(E4M3).to(dtype)
    return table.index_select(0, q.contiguous().view(torch.uint8).flatten().int()).view(q.shape)


def rows_of(x: Tensor) -> Rows:
    """Quantise activations that nothing has quantised yet.  x: (T, K)."""
    q, scale = quantise_rows(x.detach())
    return Rows(x, q if multiplies_codes(x.device) else values(q, torch.promote_types(x.dtype, torch.float32)), scale)


def add_rms_norm_rows(x: Tensor, added: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Rows]:
    """Add to the residual stream, normalise it for the branch that leaves it there and quantise, in one pass on CUDA.

    x: (T, D).  added: like x, or None.  weight: (D,), x's dtype, or fp32 under bf16.
    Returns h and rows_of(y) of h, y = add_rms_norm(x, added, weight, eps).
    """
    if face(x.device) == "triton" and native.takes(x):
        h, *rows = add_rms_norm_rows_triton(x, added, weight, eps)
        return h, Rows(*rows)
    h, y = add_rms_norm(x, added, weight, eps)
    return h, rows_of(y)


def swiglu_rows(gate: Tensor, up: Tensor) -> Rows:
    """Multiply silu(gate) and up and quantise the result, in one pass on CUDA.  gate, up: (T, F), alike."""
    if face(gate.device) == "triton" and native.takes(gate):
        return Rows(*glu_rows_triton(gate, up, False))
    return rows_of(swiglu(gate, up))


def geglu_rows(gate: Tensor, up: Tensor) -> Rows:
    """Multiply gelu(gate), in its tanh form, and up and quantise, in one pass on CUDA.  gate, up: (T, F), alike."""
    if face(gate.device) == "triton" and native.takes(gate):
        return Rows(*glu_rows_triton(gate, up, True))
    return rows_of(geglu(gate, up))
