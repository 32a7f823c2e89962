"""Time dropout by keys, which has no backward pass of its own: python -m bench.dropout; see bench/op.py.

On CUDA lora_linear draws the same mask as it loads x, so a step has this op on the CPU alone; its bits are the check.
"""

import sys
from collections.abc import Iterator

import torch

from bench.op import Case, Settings, Work, run
from e5kernels.dropout import face, keyed_dropout, keyed_dropout_reference

STREAM, DROP_BELOW = 0x5EED, 26  # 26 / 256 is about 0.1


def cases(s: Settings) -> Iterator[Case]:
    """Yield the inputs of a block's narrow and wide linears."""
    for n in s.n_tokens:
        keys = torch.randint(-(2**63), 2**63 - 1, (n,)).to(s.device)
        for width in (s.config.dim, s.config.hidden_dim):
            x = s.randn(n, width)
            yield Case(
                shape=f"{n} x {width}",
                inputs=[x],
                reference=lambda x, keys=keys: keyed_dropout_reference(x, keys, STREAM, DROP_BELOW),
                ours={face(s.device): lambda x, keys=keys: keyed_dropout(x, keys, STREAM, DROP_BELOW)},
                forward=Work(2 * x.nbytes),
                modes=("forward",),
            )


if __name__ == "__main__":
    sys.exit(run("dropout", cases))
