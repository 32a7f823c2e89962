"""What a two-pass step cannot go below: the products of its frozen weights alone, timed in the same run.

A micro-batch of T tokens and N texts has, a block, seven products forward and seven for dx (no dW). In the last block
all but k's and v's see N rows; the first block's wq, wk, wv need no dx. All but the fullest micro-batch go forward
twice. Each product is timed at its own shape, its rows rounded up to a grid (and the time scaled back), so that a large
step needs few timings.
"""

from collections import Counter
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch

from bench.models import linears
from bench.roofline import product, times_ms
from e5core.backbone import BackboneConfig
from e5core.batches import MicroBatch
from e5core.lora import LINEARS

GRID, FINE = 256, 32  # rows; the fine one for what is below 1,024 rows
BEFORE_ANY_ADAPTER = ("wq", "wk", "wv")  # of the first block: nothing that is trained lies before them


class Product(NamedTuple):
    """One product: (rows, n_in) by W^T, or for dx (rows, n_out) by W."""

    rows: int
    n_in: int
    n_out: int
    is_dx: bool

    @property
    def flops(self) -> float:
        """Return its floating-point operations."""
        return 2.0 * self.rows * self.n_in * self.n_out


class Limit:
    """The products of steps of one model on one device; what was timed once is not timed again."""

    def __init__(self, config: BackboneConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self._ms: dict[tuple[Product, torch.dtype], float] = {}

    def seconds(self, packed: Sequence[MicroBatch], dtype: torch.dtype, names: Collection[str] = LINEARS) -> float:
        """Return the time of the step's products in a dtype, of the linears of these names."""
        counted = products_of(self.config, packed, names)
        return sum(n * self._timed(one, dtype) for one, n in counted.items()) / 1e3

    def _timed(self, one: Product, dtype: torch.dtype) -> float:
        grid = GRID if one.rows >= 1024 else FINE
        rounded = one._replace(rows=-(-one.rows // grid) * grid)
        key = rounded, dtype
        if key not in self._ms:
            widths = (one.n_out, one.n_in) if one.is_dx else (one.n_in, one.n_out)
            call = product(rounded.rows, *widths, dtype, self.device, one.is_dx)
            self._ms[key] = times_ms(call, self.device, rep_ms=10)[0]
        return self._ms[key] * one.rows / rounded.rows


def products_of(
    config: BackboneConfig, packed: Sequence[MicroBatch], names: Collection[str] = LINEARS
) -> Counter[Product]:
    """Count the products of a two-pass step over these micro-batches, of the linears of these names."""
    counted: Counter[Product] = Counter()
    *pieces, fullest = sorted(packed, key=lambda piece: len(piece.tokens))
    for piece in packed:
        forwards = 1 if piece is fullest else 2
        for layer in range(config.n_layers):
            for name, (n_in, n_out) in linears(config).items():
                if name not in names:
                    continue
                is_narrow = layer == config.n_layers - 1 and name not in ("wk", "wv")
                rows = len(piece.rows) if is_narrow else len(piece.tokens)
                counted[Product(rows, n_in, n_out, False)] += forwards
                if layer or name not in BEFORE_ANY_ADAPTER:
                    counted[Product(rows, n_in, n_out, True)] += 1
    return counted


def model_flops(config: BackboneConfig, packed: Sequence[MicroBatch]) -> float:
    """Count the FLOPs that a step needs at least, one forward pass and one for dx: what MFU is taken of."""
    return sum(flops for piece in packed for flops in (p.flops * n for p, n in products_of(config, [piece]).items()))
