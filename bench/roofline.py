"""What a device can do, measured or published, and one JSON line a result.

The matrix peak of a CPU is measured in the same run (a large product), since neither clock nor vector width can be
relied on in a virtual machine; that of a GPU is its data sheet's dense figure.
"""

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
import triton

GPU_PEAKS = {"NVIDIA H100": 989e12, "NVIDIA H200": 989e12, "NVIDIA A100": 312e12}  # bf16 dense FLOP/s, data sheets


def device_name(device: torch.device) -> str:
    """Name the device as result files do."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu-{torch.get_num_threads()}-threads-{torch.backends.cpu.get_cpu_capability().lower()}"


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s that a roofline percentage is taken of."""
    if device.type == "cuda":
        return next((peak for name, peak in GPU_PEAKS.items() if device_name(device).startswith(name)), float("nan"))
    a, b = torch.ones(2048, 1536, dtype=dtype), torch.ones(1536, 1536, dtype=dtype)
    return 2 * 2048 * 1536 * 1536 / median_seconds(lambda: a @ b, device, runs=7)


def median_seconds(function: Callable[[], object], device: torch.device, runs: int) -> float:
    """Time a call: one to warm up, then the median of `runs`."""
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return sorted(times)[runs // 2]


def record(row: dict[str, object], device: torch.device, out: Path) -> None:
    """Print a result and append it to a JSON-lines file, with device, versions and commit."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    versions = {"torch": torch.__version__, "triton": triton.__version__, "commit": commit}
    line = json.dumps({**row, "device": device_name(device), **versions})
    print(line)
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out, "a", encoding="utf-8") as file:
        file.write(line + "\n")
