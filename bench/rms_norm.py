"""Time RMSNorm at the rows of a micro-batch and of its last tokens: python -m bench.rms_norm; see bench/op.py."""

import sys
from collections.abc import Iterator

import torch

from bench.op import Case, Settings, Work, run
from e5kernels.rms_norm import face, rms_norm, rms_norm_reference


def cases(s: Settings) -> Iterator[Case]:
    """Yield a case for every number of rows; the weight is frozen and in fp32, as the model holds it."""
    weight, eps = torch.rand(s.config.dim, device=s.device) + 0.5, s.config.norm_eps
    for n in (*s.n_tokens, max(1, max(s.n_tokens) // 128)):
        x = s.randn(n, s.config.dim)
        yield Case(
            shape=f"{n} x {s.config.dim}",
            inputs=[x],
            reference=lambda x: rms_norm_reference(x, weight, eps),
            ours={face(s.device): lambda x: rms_norm(x, weight, eps)},
            forward=Work(2 * x.nbytes),
            backward=Work(3 * x.nbytes),
        )


if __name__ == "__main__":
    sys.exit(run("rms_norm", cases))
