"""Time the gated activations SwiGLU and GeGLU: python -m bench.swiglu; see bench/op.py."""

import sys
from collections.abc import Iterator

from bench.op import Case, Settings, Work, run
from e5kernels.swiglu import face, geglu, geglu_reference, swiglu, swiglu_reference


def cases(s: Settings) -> Iterator[Case]:
    """Yield both activations of every micro-batch."""
    for n in s.n_tokens:
        for name, ours, reference in (("SwiGLU", swiglu, swiglu_reference), ("GeGLU", geglu, geglu_reference)):
            inputs = [s.randn(n, s.config.hidden_dim), s.randn(n, s.config.hidden_dim)]
            yield Case(
                shape=f"{name}: {n} x {s.config.hidden_dim}",
                inputs=inputs,
                reference=reference,
                ours={face(s.device): ours},
                forward=Work(3 * inputs[0].nbytes),
                backward=Work(5 * inputs[0].nbytes),
            )


if __name__ == "__main__":
    sys.exit(run("swiglu", cases))
