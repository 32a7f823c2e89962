"""Time InfoNCE, forward and backward, with and without the matrix in memory: python -m bench.infonce; see bench/op.py.

Two faces of ours: "tiles" (infonce_triton) and "rows" (infonce_rows). Extra memory leaves out inputs, gradients and the
fp32 sums of the candidates' gradient. Limits: on an H100 torch.compile took 4.9 ms at 8,192 x 16,384 x 4,096 in bf16
(DESIGN section 5); rows may take 1.2 times that, tiles 1.7 times. At 65,536 x 131,072 a dense matrix has 34 GB: only
ours run, and are not checked there. FLOPs of the floor are those of 3 products, the least there is.
"""

import sys
from collections.abc import Iterator

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from bench.op import MODES, Case, Function, Settings, Work, run
from e5kernels.infonce import Relations, infonce_reference, infonce_rows, infonce_triton

TEMPERATURE = 0.02
SHAPES = {
    "7b": ((2048, 4096), (8192, 16384), (16384, 32768), (65536, 131072)),
    "135m": ((256, 512), (1024, 2048)),
    "tiny": ((16, 32),),
}
LIMITS_MS = {(8192, 16384): {"tiles": 1.7 * 4.9, "rows": 1.2 * 4.9}}
DENSE = 16384 * 32768  # scores that are materialised at most


def cases(s: Settings) -> Iterator[Case]:
    """Yield every shape; each query has a positive and a negative of its own, and sees all candidates."""
    ours: dict[str, Function] = {"rows": infonce_rows}
    if s.device.type == "cuda" or triton.knobs.runtime.interpret:
        ours["tiles"] = infonce_triton
    for n_queries, n_candidates in SHAPES[s.size]:
        dense, dim = n_queries * n_candidates <= DENSE, s.config.dim
        relations = relations_of(n_queries, n_candidates).to(s.device)
        inputs = [F.normalize(s.randn(n, dim), dim=-1) for n in (n_queries, n_candidates)]
        product = 2.0 * n_queries * n_candidates * dim
        sums = sum(x.nbytes for x in inputs) + 4 * n_candidates * dim * (s.dtype != torch.float32)
        in_bf16 = s.device.type == "cuda" and s.dtype == torch.bfloat16 and dim == 4096
        yield Case(
            shape=f"{n_queries} x {n_candidates} x {dim}",
            inputs=inputs,
            reference=_loss(infonce_reference, relations) if dense else None,
            ours={name: _loss(function, relations) for name, function in ours.items()},
            forward=Work(sum(x.nbytes for x in inputs), product),
            backward=Work(2 * sum(x.nbytes for x in inputs), 2 * product),
            modes=MODES if dense else ("both",),
            excluded=dict.fromkeys(ours, sums),
            limits_ms=LIMITS_MS.get((n_queries, n_candidates), {}) if in_bf16 else {},
        )


def relations_of(n_queries: int, n_candidates: int) -> Relations:
    """Make relations without duplicates, as a batch of pairs with hard negatives has them."""
    rows, places = torch.arange(n_queries), torch.arange(n_candidates)
    each, is_open = n_candidates // n_queries, torch.ones(n_candidates, dtype=torch.bool)
    return Relations(each * rows, rows, places // each, -1 - rows[:, None], places, is_open[:n_queries], is_open)


def _loss(function: Function, relations: Relations) -> Function:
    def loss(queries: Tensor, candidates: Tensor) -> Tensor:
        return function(queries, candidates, relations, temperature=TEMPERATURE).loss

    return loss


if __name__ == "__main__":
    sys.exit(run("infonce", cases))
