"""Time last-token pooling of a packed micro-batch: python -m bench.last_token; see bench/op.py."""

import sys
from collections.abc import Iterator

from bench.op import Case, Settings, Work, run
from bench.workloads import bounds_of, packed_lengths
from e5kernels.last_token import face, last_token, last_token_reference


def cases(s: Settings) -> Iterator[Case]:
    """Yield a micro-batch of W64's lengths for every number of tokens."""
    for n in s.n_tokens:
        lengths = packed_lengths(n)
        bounds, x = bounds_of(lengths, s.device), s.randn(n, s.config.dim)
        rows = 2 * len(lengths) * s.config.dim * x.itemsize
        yield Case(
            shape=f"{n} x {s.config.dim}, {len(lengths)} sequences",
            inputs=[x],
            reference=lambda x, bounds=bounds: last_token_reference(x, bounds),
            ours={face(s.device): lambda x, bounds=bounds: last_token(x, bounds)},
            forward=Work(rows),
            backward=Work(x.nbytes + rows),
        )


if __name__ == "__main__":
    sys.exit(run("last_token", cases))
