"""How far a kernel may stand from its reference: one number pair per op, and the rule for narrow dtypes."""

import torch
from torch import Tensor

FP32 = {  # op: (atol, rtol)
    "last_token": (0.0, 0.0),  # a copy
    "infonce.loss": (1e-6, 1e-5),
    "infonce.lse": (1e-5, 1e-5),
    "infonce.gradient": (1e-5, 1e-5),  # elements reach 1 / (temperature * rows), 50 for one row
    "attention": (5e-5, 1e-5),  # measured 2e-5 on gradients that reach 10, where plain torch makes up to 1e-5
    "rms_norm": (1e-5, 2e-6),  # of one channel, the gradient is the rest of two terms that cancel, times 1 / rms
    "rope": (1e-6, 1e-6),
    "glu": (2e-6, 2e-6),
    "lora_linear": (1e-5, 1e-5),
    "fp8_linear": (2e-5, 1e-5),  # elements reach 20, of a gradient through B
}


def assert_fp32(op: str, got: Tensor, expected: Tensor) -> None:
    """Hold an fp32 kernel's output to the table above."""
    atol, rtol = FP32[op]
    torch.testing.assert_close(got, expected, atol=atol, rtol=rtol)


def assert_fp64(got: Tensor, expected: Tensor) -> None:
    """Hold a float64 result to 1e-12 of the norm of what is expected, which leaves room for the order of sums."""
    assert got.dtype == expected.dtype == torch.float64 and got.shape == expected.shape
    error, size = (got - expected).norm(), expected.norm()
    assert error <= 1e-12 * size + 1e-13, f"error {error:.3e}, norm {size:.3e}"


def assert_twice(got: Tensor, same_dtype: Tensor, fp32: Tensor, rounds: int = 1) -> None:
    """Hold a kernel to twice the error that plain torch makes in the same dtype, `rounds` times; both against fp32."""
    allowed = 2 * rounds * (same_dtype.float() - fp32).abs().max() + 1e-5
    error = (got.float() - fp32).abs().max()
    assert error <= allowed, f"error {error:.3e}, allowed {allowed:.3e}"
