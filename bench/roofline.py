"""What a device can do, measured and published: python -m bench.roofline [--device cuda] [--size 7b] [--tokens 8192].

Every percentage of the benches is of what the same run measured: a large copy, its bytes read and written, and the
products of the model's linears, forward (x W^T) and for dx (g W), whose best is the peak. Neither clock nor vector
width of a virtual CPU can be relied on, and a GPU seldom gives what its data sheet says; that figure stands beside.

This room also has the clock of the benches and their one JSON line a result.
"""

import argparse
import json
import math
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from torch import Tensor

from bench.models import SIZES, default_size, linears

FP8 = torch.float8_e4m3fn
CACHES = 4  # a copied buffer is this many times the caches' size, so that memory is measured
SLOW_MS = 400.0  # a call that takes longer is timed a few times only


@dataclass(frozen=True)
class Sheet:
    """A data sheet: dense FLOP/s by dtype and bytes/s of memory, for the SXM form."""

    flops: dict[torch.dtype, float]
    bytes_per_s: float
    source: str


_HOPPER = {torch.bfloat16: 989e12, FP8: 1979e12, torch.float32: 67e12}  # half of the figures "with sparsity"
SHEETS = {
    "NVIDIA H100": Sheet(_HOPPER, 3.35e12, "NVIDIA H100 Tensor Core GPU data sheet, H100 SXM"),
    "NVIDIA H200": Sheet(_HOPPER, 4.8e12, "NVIDIA H200 Tensor Core GPU data sheet, H200 SXM"),
    "NVIDIA A100": Sheet(
        {torch.bfloat16: 312e12, torch.float32: 19.5e12}, 2.039e12, "NVIDIA A100 data sheet, A100 80GB SXM"
    ),
}


@dataclass(frozen=True)
class Roofline:
    """What this device did in this run."""

    bytes_per_s: float
    flops: dict[torch.dtype, float]

    def floor_ms(self, n_bytes: float, flops: float, dtype: torch.dtype) -> float:
        """Return the least time for so many bytes and FLOPs."""
        return 1e3 * max(n_bytes / self.bytes_per_s, flops / self.flops[dtype])


def sheet_of(device: torch.device) -> Sheet | None:
    """Return the device's data sheet; None for a CPU and a GPU that is not listed."""
    return next((sheet for name, sheet in SHEETS.items() if device_name(device).startswith(name)), None)


def device_name(device: torch.device) -> str:
    """Name the device as result files do."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu-{torch.get_num_threads()}-threads-{torch.backends.cpu.get_cpu_capability().lower()}"


def chosen_device(name: str | None) -> torch.device:
    """Return the device of --device; None means CUDA where there is one."""
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def result_file(out: Path | None, device: torch.device) -> Path:
    """Return the file of --out; None means the device's in bench/results."""
    return out or Path(f"bench/results/{device_name(device)}.jsonl")


def takes_fp8(device: torch.device) -> bool:
    """Say whether the device multiplies row-wise scaled e4m3 (sm_89 and newer)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def measure(device: torch.device, dtypes: Sequence[torch.dtype], size: str, n_tokens: int) -> Roofline:
    """Measure the copy and, in each dtype, the products of a model's linears."""
    flops = {dtype: max(rate for _, rate in product_rates(device, dtype, size, n_tokens)) for dtype in dtypes}
    return Roofline(copy_rate(device), flops)


def copy_rate(device: torch.device) -> float:
    """Measure the bytes/s that a large copy reads and writes."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 2**25
    n_bytes = max(CACHES * cache, 2**30 if device.type == "cuda" else 2**27)
    source = torch.empty(n_bytes, dtype=torch.uint8, device=device).random_()  # zeros can be faster than real data
    target = torch.empty_like(source)
    return 2 * source.nbytes / times_ms(lambda: target.copy_(source), device)[0] * 1e3


def product_rates(device: torch.device, dtype: torch.dtype, size: str, n_tokens: int) -> Iterator[tuple[str, float]]:
    """Yield ("tokens x in x out, forward", FLOP/s) of each different linear of a block, and of its dx."""
    for n_in, n_out in dict.fromkeys(linears(SIZES[size]).values()):
        for way, width, out in (("forward", n_in, n_out), ("dx", n_out, n_in)):
            seconds = times_ms(product(n_tokens, width, out, dtype, device, way == "dx"), device)[0] / 1e3
            yield f"{n_tokens} x {n_in} x {n_out}, {way}", 2 * n_tokens * n_in * n_out / seconds


def product(
    n_rows: int, width: int, n_out: int, dtype: torch.dtype, device: torch.device, is_dx: bool = False
) -> Callable[[], Tensor]:
    """Return a product of (n_rows, width) with random values: by W (n_out, width)^T, or for dx by W (width, n_out).

    fp8: e4m3 with a scale a row of each operand, bf16 out; its dx takes W^T laid out anew, as fp8 units want it.
    """
    x = torch.randn(n_rows, width, device=device, dtype=torch.bfloat16 if dtype == FP8 else dtype)
    if dtype == FP8:
        weight = torch.randn(n_out, width, device=device, dtype=torch.bfloat16).to(FP8)
        scales = torch.ones(n_rows, 1, device=device), torch.ones(1, n_out, device=device)
        rows = x.to(FP8)
        return lambda: torch._scaled_mm(
            rows, weight.T, scale_a=scales[0], scale_b=scales[1], out_dtype=torch.bfloat16, use_fast_accum=True
        )
    weight = torch.randn(*((width, n_out) if is_dx else (n_out, width)), device=device, dtype=dtype)
    return lambda: x @ (weight if is_dx else weight.T)


def times_ms(function: Callable[[], object], device: torch.device, rep_ms: float = 100.0) -> tuple[float, float, float]:
    """Time a call: median, 20th and 80th percentile, in ms.

    On CUDA by triton.testing.do_bench: events, the cache cleared before each call. A call slower than SLOW_MS, and any
    on the CPU, is timed by the clock: one to warm up, then as many as fit rep_ms, at least 3.
    """
    function()
    synchronize(device)
    first = _clocked_ms(function, device)
    if device.type == "cuda" and first < SLOW_MS:
        median, low, high = triton.testing.do_bench(function, warmup=25, rep=int(rep_ms), quantiles=[0.5, 0.2, 0.8])
        return median, low, high
    n = 1 if first > 10 * SLOW_MS else max(2, min(100, math.ceil(rep_ms / max(first, 1e-3)) - 1))
    times = sorted([first, *(_clocked_ms(function, device) for _ in range(n))])
    return times[len(times) // 2], times[len(times) // 5], times[min(len(times) - 1, 4 * len(times) // 5)]


def synchronize(device: torch.device) -> None:
    """Wait for the device's work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _clocked_ms(function: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    function()
    synchronize(device)
    return 1e3 * (time.perf_counter() - start)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of a large product: on a CPU measured, on a GPU its data sheet's (NaN where not listed)."""
    if device.type == "cuda":
        sheet = sheet_of(device)
        return float("nan") if sheet is None else sheet.flops[dtype]
    a, b = torch.ones(2048, 1536, dtype=dtype), torch.ones(1536, 1536, dtype=dtype)
    return 2 * 2048 * 1536 * 1536 / median_seconds(lambda: a @ b, device, runs=7)


def median_seconds(function: Callable[[], object], device: torch.device, runs: int) -> float:
    """Time a call: one to warm up, then the median of `runs`."""
    function()
    synchronize(device)
    return sorted(_clocked_ms(function, device) / 1e3 for _ in range(runs))[runs // 2]


def record(row: dict[str, object], device: torch.device, out: Path) -> None:
    """Print a result and append it to a JSON-lines file, with device, versions and commit."""
    versions = {"torch": torch.__version__, "triton": triton.__version__, "commit": _commit()}
    line = json.dumps({**row, "device": device_name(device), **versions})
    print(line, flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out, "a", encoding="utf-8") as file:
        file.write(line + "\n")


def _commit() -> str:
    """Return the commit's short name; "" where git or the repository's history is missing, as on a lent machine."""
    try:
        return subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        return ""


def main() -> None:
    """Measure the copy and every product, a row each, beside the best of this run and the data sheet."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--size", choices=SIZES, help="whose linears (default: 7b on CUDA, 135m on a CPU)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 8192], help="of a micro-batch")
    parser.add_argument("--out", type=Path, help="JSON-lines file to append to (default: bench/results/DEVICE.jsonl)")
    arguments = parser.parse_args()
    device = chosen_device(arguments.device)
    size, out = arguments.size or default_size(device), result_file(arguments.out, device)
    sheet, rate = sheet_of(device), copy_rate(device)
    row = {"bench": "roofline", "what": "copy", "gb_per_s": round(rate / 1e9, 1)}
    if sheet is not None:
        row |= {"sheet_percent": round(100 * rate / sheet.bytes_per_s, 1), "sheet": sheet.source}
    record(row, device, out)
    for dtype in (torch.bfloat16, *((FP8,) if takes_fp8(device) else (torch.float32,) * (device.type == "cpu"))):
        rates = {what: r for n in arguments.tokens for what, r in product_rates(device, dtype, size, n)}
        for what, flops in rates.items():
            row = {"bench": "roofline", "what": what, "dtype": str(dtype).removeprefix("torch.")}
            row |= {"tflop_per_s": round(flops / 1e12, 4)}
            row |= {"roofline_percent": round(100 * flops / max(rates.values()), 1)}
            if sheet is not None and dtype in sheet.flops:
                row |= {"sheet_percent": round(100 * flops / sheet.flops[dtype], 1), "sheet": sheet.source}
            record(row, device, out)


if __name__ == "__main__":
    main()
