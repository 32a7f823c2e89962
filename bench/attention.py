"""Time packed attention against one scaled_dot_product_attention call a sequence: python -m bench.attention.

Shapes: the quickstart's (48 texts of 10 to 64 tokens), documents of 128 tokens, and sequences of 2,048, with SmolLM2's
9 query and 3 key heads of 64 channels. FLOPs are those of the pairs that see each other: 4 H head_dim a pair forward,
10 backward. Floor: they at the peak of a large product in the same dtype, measured in this run (bench/roofline.py).
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from bench.roofline import device_name, median_seconds, peak_flops, record
from e5kernels.attention import face, varlen_attention, varlen_attention_reference

SHAPES = {"quickstart": [10 + (17 * i) % 55 for i in range(48)], "documents": [128] * 16, "long": [2048] * 2}
HEADS, KV_HEADS, HEAD_DIM = 9, 3, 64
Attention = Callable[..., Tensor]


def main() -> None:
    """Measure every shape, dtype and face, forward and backward."""
    arguments = _parser().parse_args()
    device = torch.device(arguments.device)
    out = arguments.out or Path(f"bench/results/{device_name(device)}.jsonl")
    for dtype in (getattr(torch, name) for name in arguments.dtypes):
        peak = peak_flops(device, dtype)
        for name, lengths in SHAPES.items():
            pairs = sum(length * (length + 1) // 2 for length in lengths)
            seconds = {
                "sdpa a sequence": _seconds(varlen_attention_reference, lengths, dtype, device, arguments.runs),
                face(device): _seconds(varlen_attention, lengths, dtype, device, arguments.runs),
            }
            for kind, (forward, backward) in seconds.items():
                for way, taken, factor in (("forward", forward, 4), ("backward", backward, 10)):
                    flops = factor * pairs * HEADS * HEAD_DIM
                    row = {"bench": "attention", "shape": name, "way": way, "face": kind, "dtype": str(dtype)}
                    row |= {"ms": round(1e3 * taken, 2), "floor_ms": round(1e3 * flops / peak, 2)}
                    record(row | {"roofline_percent": round(100 * flops / taken / peak, 1)}, device, out)


def _seconds(
    attention: Attention, lengths: list[int], dtype: torch.dtype, device: torch.device, runs: int
) -> tuple[float, float]:
    """Time forward with a graph, and backward, in seconds."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(sum(lengths), heads, HEAD_DIM, generator=generator).to(device, dtype).requires_grad_()
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
    out = attention(q, k, v, cu_seqlens, scale=HEAD_DIM**-0.5)
    g = torch.randn(out.shape, generator=generator).to(device, dtype)
    forward = median_seconds(lambda: attention(q, k, v, cu_seqlens, scale=HEAD_DIM**-0.5), device, runs)
    backward = median_seconds(lambda: torch.autograd.grad(out, (q, k, v), g, retain_graph=True), device, runs)
    return forward, backward


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--out", type=Path)
    return parser


if __name__ == "__main__":
    main()
