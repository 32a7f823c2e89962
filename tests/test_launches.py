"""Every kernel of a Mistral-7B step compiles as it is launched there, and none compiles anew for other token counts.

Run as a script, in a process that has no TRITON_INTERPRET: a step is run dry (bench/dry_run.py), and each launch goes
through Triton's own, up to where a driver would be asked. By hand it prints a line a step.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import ROOT
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from bench.dry_run import Uncomputed, as_on_a_gpu
from bench.models import MISTRAL, write_config
from bench.plan import CPU, CUDA, measure
from e5core.config import load_config
from e5core.distributed import World
from e5core.memory import Setting
from e5core.run import Config

H100, SHARED_BYTES = GPUTarget("cuda", 90, 32), 227 * 1024  # most of a program, by the CUDA programming guide
FP8 = ["backbone.frozen_dtype=fp8", "backbone.fp8_skip=[]"]
SMALL = ("_last_token_forward_kernel",)  # an op of torch's, which a dry run leaves out where it is large
STEPS: dict[str, tuple[int, int, str, list[str]]] = {  # name: tokens, of a text, recompute, overrides
    "first": (8192, 128, "none", []),
    "fewer tokens": (4096, 64, "none", []),
    "odd tokens": (1001, 7, "none", []),
    "texts of one token": (33, 1, "none", []),
    "recompute": (8192, 128, "block", []),
    "no dropout": (8192, 128, "none", ["lora.dropout=0.0"]),
    "fp8": (8192, 128, "none", FP8),
    "fp8, odd tokens": (999, 9, "none", FP8),
}


class Driver:
    """What Triton asks of a driver before it launches; of a GPU that is not there."""

    def get_current_target(self) -> GPUTarget:
        return H100

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


def compiled_by_steps() -> dict[str, dict[str, Any]]:
    """Run all steps, one after another.  Returns each one's newly compiled kernels, and the most shared memory."""
    driver.set_active(Driver())
    launch, seen, found = JITFunction.run, {}, {}

    def compile_only(kernel: JITFunction, *arguments: Any, warmup: bool = False, **settings: Any) -> None:
        made = launch(kernel, *arguments, warmup=True, **settings)
        seen[kernel.__name__, made.hash] = made.metadata.shared

    with tempfile.TemporaryDirectory() as folder:
        write_config(Path(folder), replace(MISTRAL, n_layers=3), torch.bfloat16)  # the first, one between, the last
        for name, (tokens, length, policy, overrides) in STEPS.items():
            before = set(seen)
            paths = [f"backbone.path={folder}", *overrides]
            config = load_config(Config, ROOT / "configs/e5_mistral_7b.toml", paths)
            with as_on_a_gpu("cpu", compile_only), Uncomputed():
                world = World(rank=0, world_size=1, device=CPU)
                measure(config, Setting("none", tokens, policy), length, world, CUDA)
            new = Counter(kernel for kernel, _ in set(seen) - before)
            found[name] = {"compiled": dict(new), "shared": max(seen.values())}
    return found


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(json.loads(line) for line in done.stdout.splitlines())


def test_all_kernels_of_a_step_compile_as_they_are_launched(steps: dict[str, Any]) -> None:
    assert len(steps["first"]["compiled"]) == 14
    in_fp8 = {"_add_rms_norm_rows_kernel", "_glu_rows_kernel", "_quantise_rows_kernel"}
    assert set(steps["fp8"]["compiled"]) > in_fp8  # and attention's, whose output has no spare columns then
    assert max(step["shared"] for step in steps.values()) <= SHARED_BYTES


@pytest.mark.parametrize(
    "name", ["fewer tokens", "odd tokens", "texts of one token", "recompute", "fp8, odd tokens", "no dropout"]
)
def test_other_token_counts_compile_nothing(name: str, steps: dict[str, Any]) -> None:
    new = set(steps[name]["compiled"]).difference(SMALL)
    assert new == ({"_lora_linear_forward_kernel", "_lora_linear_backward_kernel"} if name == "no dropout" else set())


if __name__ == "__main__":
    for item in compiled_by_steps().items():
        print(json.dumps(item), flush=True)
