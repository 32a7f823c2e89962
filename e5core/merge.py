"""Merge adapters of one base model into one: `python -m e5core.merge OUT RUN_OR_ADAPTER... --method linear|slerp`.

What is merged is what an adapter adds to a weight, its delta s B A; never A and B by themselves, since the product of
two means is not the mean of two products. A mean of deltas is the mean of the merged models' weights (model soups,
arXiv 2203.05482). With weights w_i that sum to 1, for every linear:

    linear  sum_i w_i delta_i
    slerp   sin((1-t) a) / sin(a) delta_1 + sin(t a) / sin(a) delta_2,  t = w_2, a the angle between the deltas
            (linear where they are parallel)

Both are sums of deltas, which the merged adapter holds exactly, its ranks laid side by side: A = [A_1; A_2] and
B = [c_1 s_1 B_1 | c_2 s_2 B_2]. --rank R cuts every delta to its best rank R (SVD) and says what that costs.
"""

import argparse
import json
import math
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from e5core.adapter import adapter_tensors, write_adapter
from e5core.checkpoint import Card, check_files, write_json
from e5core.distributed import log, log_error
from e5core.lora import LoraConfig
from e5core.text_encoder import Encoder
from e5core.trained import check_base, find_card, lora_of, trained_folder

Method = Literal["linear", "slerp"]
_PARALLEL = 1e-6  # sine of an angle below which slerp is linear


@dataclass(frozen=True, kw_only=True, slots=True)
class Adapter:
    """One of the adapters: factors of every linear's delta, (A (R, in), B (out, R) times the scale), fp32."""

    folder: Path
    card: Card
    lora: LoraConfig
    factors: dict[str, tuple[Tensor, Tensor]]


def merge(
    out: Path,
    models: Sequence[str],
    method: Method = "linear",
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    base: str | None = None,
) -> float:
    """Merge runs or adapters into a new adapter folder.

    weights: one a model, not negative, equal where None; divided by their sum.  rank: None keeps the sum exact.
    base: where the base model lies, None: where the first adapter says.
    Returns what the cut to `rank` lost: the norm of the difference by the norm of all deltas; 0 without a cut.
    Raises ValueError or OSError that names what does not fit; then nothing is left behind.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists; choose another name, or move it away")
    shares = _shares(models, method, weights)
    merged = [_read(model, base) for model in models]
    first = merged[0]
    for other in merged[1:]:
        _check_alike(first, other)
    path = check_base(first.folder, first.card)
    tensors, lost, ranks = {}, [], set()
    for linear in first.factors:
        a, b = _summed([one.factors[linear] for one in merged], shares, method)
        if rank is not None:
            a, b, squares = _cut(a, b, rank)
            lost.append(squares)
        tensors[f"{linear}.lora_a"], tensors[f"{linear}.lora_b"] = a, b
        ranks.add(len(a))
    (width,) = ranks  # the linears of an adapter are of one rank
    lora = replace(first.lora, rank=width, alpha=float(width), init=None)
    _write(out, tensors, lora, replace(first.card, lora=asdict(lora)), path)
    missed, whole = (math.fsum(part) for part in zip(*lost, strict=True)) if lost else (0.0, 1.0)
    return math.sqrt(missed / whole) if whole else 0.0


def _shares(models: Sequence[str], method: Method, weights: Sequence[float] | None) -> list[float]:
    if len(models) < 2 or (method == "slerp" and len(models) != 2):
        raise ValueError(f"{method} merges {'two' if method == 'slerp' else 'two or more'} adapters: got {len(models)}")
    weights = [1.0] * len(models) if weights is None else list(weights)
    total = math.fsum(weights)
    if len(weights) != len(models) or not all(0 <= weight < math.inf for weight in weights) or not total:
        raise ValueError(f"weights must be {len(models)} numbers, none negative, not all 0: got {weights}")
    return [weight / total for weight in weights]


def _read(model: str, base: str | None) -> Adapter:
    folder = trained_folder(Path(model))
    if folder is None:
        raise ValueError(f"{model}: no run and no adapter folder; merged are adapters")
    check_files(folder)
    card = find_card(folder, base)
    lora = lora_of(card)
    if lora is None:
        raise ValueError(f"{folder}: all its weights were trained, and merged are adapters; it has none")
    tensors = {name: tensor.float() for name, tensor in adapter_tensors(folder)}
    scale = lora.alpha / lora.rank
    linears = sorted({name.rpartition(".")[0] for name in tensors})
    for linear in linears:
        for leaf in ("lora_a", "lora_b"):
            if f"{linear}.{leaf}" not in tensors:
                raise ValueError(f"{folder}: {linear} has no {leaf}; the adapter is damaged, copy it again")
    factors = {name: (tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"] * scale) for name in linears}
    return Adapter(folder=folder, card=card, lora=lora, factors=factors)


def _check_alike(first: Adapter, other: Adapter) -> None:
    for field in ("base_sha256", "causal", "pooling", "frozen_dtype", "fp8_skip", "tokenizer_contract", "template"):
        one, two = asdict(first.card)[field], asdict(other.card)[field]
        if one != two:
            raise ValueError(
                f"{other.folder} cannot be merged with {first.folder}: its {field} is {two!r:.120}, not {one!r:.120}"
            )
    shapes = [{n: (a.shape[1], b.shape[0]) for n, (a, b) in each.factors.items()} for each in (first, other)]
    if shapes[0] != shapes[1]:
        odd = sorted(name for name in shapes[0].keys() | shapes[1].keys() if shapes[0].get(name) != shapes[1].get(name))
        raise ValueError(f"{other.folder} cannot be merged with {first.folder}: they adapt other linears: {odd[:3]}")


def _summed(factors: Sequence[tuple[Tensor, Tensor]], shares: Sequence[float], method: Method) -> tuple[Tensor, Tensor]:
    """Return A (sum of ranks, in) and B (out, sum of ranks) of the merged delta."""
    scales = shares if method == "linear" else _slerp(factors[0], factors[1], shares[1])
    a = torch.cat([a for a, _ in factors])
    return a, torch.cat([scale * b for scale, (_, b) in zip(scales, factors, strict=True)], dim=1)


def _slerp(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], t: float) -> tuple[float, float]:
    """Return the scales of the two deltas.  No delta is made: <B1 A1, B2 A2> = sum(B1^T B2 * A1 A2^T)."""

    def inner(one: tuple[Tensor, Tensor], two: tuple[Tensor, Tensor]) -> float:
        (a, b), (c, d) = one, two
        return ((b.double().T @ d.double()) * (a.double() @ c.double().T)).sum().item()

    norms = math.sqrt(inner(first, first) * inner(second, second))
    angle = math.acos(max(-1.0, min(1.0, inner(first, second) / norms))) if norms else 0.0
    if math.sin(angle) < _PARALLEL:
        return 1 - t, t
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def _cut(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor, tuple[float, float]]:
    """Return the best A and B of this rank, and the squared norms of what is lost and of the whole."""
    q, r = torch.linalg.qr(b.double())
    p, s = torch.linalg.qr(a.double().T)
    u, values, v = torch.linalg.svd(r @ s.T)  # of the small matrix between: B A = q (r s^T) p^T
    if rank > len(values):
        raise ValueError(f"rank must be at most {len(values)}, the ranks of the adapters added up: got {rank}")
    root = values[:rank].sqrt()
    squares = values.square()
    new_a, new_b = root[:, None] * (v[:rank] @ p.T), (q @ u[:, :rank]) * root
    return new_a.float(), new_b.float(), (squares[rank:].sum().item(), squares.sum().item())


def _write(out: Path, tensors: dict[str, Tensor], lora: LoraConfig, card: Card, base: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=".partial_", dir=out.absolute().parent) as room:
        partial = Path(room) / out.name
        partial.mkdir()
        write_adapter(partial, tensors, lora, str(base.absolute()))
        write_json(partial / "e5core.json", asdict(card))
        # in bf16, which "auto" may choose, they would not do for a check in fp32
        golden = Encoder.load(str(partial), dtype="float32").golden_vectors()
        np.save(partial / "golden.npy", golden, allow_pickle=False)
        os.rename(partial, out)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.  Returns the exit status: 0, or 2 for bad input."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m e5core.merge", description=__doc__, formatter_class=formatter)
    parser.add_argument("out", metavar="OUT", type=Path, help="adapter folder to write; may not exist")
    parser.add_argument("models", metavar="RUN_OR_ADAPTER", nargs="+")
    parser.add_argument("--method", choices=get_args(Method), default="linear")
    parser.add_argument("--weights", type=float, nargs="+", metavar="W", help="one for each (default: equal)")
    parser.add_argument("--rank", type=int, metavar="R", help="cut the merged adapter to this rank (default: exact)")
    parser.add_argument("--base", metavar="PATH", help="base model (default: where the adapters say)")
    arguments = parser.parse_args(argv)
    if arguments.rank is not None and arguments.rank < 1:
        parser.error(f"--rank must be 1 or more: got {arguments.rank}")
    try:
        lost = merge(
            arguments.out, arguments.models, arguments.method, arguments.weights, arguments.rank, arguments.base
        )
    except (ValueError, OSError, FloatingPointError) as error:
        log_error(f"e5core.merge: {error}")
        return 2
    rank = json.loads((arguments.out / "adapter_config.json").read_text(encoding="utf-8"))["r"]
    log(f"wrote {arguments.out}: rank {rank}, {'exact' if arguments.rank is None else f'lost {lost:.2%} of the norm'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
