"""Time rotary positions on the query and key heads of a packed projection: python -m bench.rope; see bench/op.py."""

import sys
from collections.abc import Iterator

import torch

from bench.op import Case, Settings, Work, run
from e5core.backbone import rotary_of
from e5kernels.rope import face, rope, rope_reference


def cases(s: Settings) -> Iterator[Case]:
    """Yield q and k of every micro-batch, as views of (T, heads of q, k and v, head_dim)."""
    c = s.config
    for n in s.n_tokens:
        packed = s.randn(n, c.n_heads + 2 * c.n_kv_heads, c.head_dim)
        cos, sin = rotary_of(torch.arange(n, device=s.device) % 512, c.rope_theta, None, c.head_dim, torch.float64)
        wide = torch.promote_types(s.dtype, torch.float32)
        angles = cos.to(wide), sin.to(wide)
        for name, x in (("q", packed[:, : c.n_heads]), ("k", packed[:, c.n_heads : c.n_heads + c.n_kv_heads])):
            moved = 2 * x.numel() * x.itemsize
            yield Case(
                shape=f"{name}: {n} x {x.shape[1]} x {c.head_dim}",
                inputs=[x],
                reference=lambda x, t=(cos, sin): rope_reference(
                    x, *(part.to(torch.promote_types(x.dtype, torch.float32)) for part in t)
                ),
                ours={face(s.device): lambda x, t=angles: rope(x, *t)},
                forward=Work(moved),
                backward=Work(moved),
            )


if __name__ == "__main__":
    sys.exit(run("rope", cases))
