"""How one op is checked, timed and told: the harness of bench/rms_norm.py and the like, a file an op.

    python -m bench.OP [--device cuda] [--size 7b] [--tokens 8192] [--dtypes bfloat16 float32] [--no-compile]

An op's file yields cases. Each implementation is first held to the definition, by the rule of the tests: in outputs and
gradients its error against the reference in a wider dtype is at most twice that of plain torch in the same dtype. What
fails, or raises, is told in its row and by the exit status, and the others are timed all the same. Then forward (with
what a backward pass needs), backward, and both are timed: median, 20th and 80th percentile. The floor of a case is the
larger one of its bytes at the copy's rate and its FLOPs at the best product's, both measured in the same run
(bench/roofline.py). Peak MiB are those beyond what there was before the call: by CUDA's allocator, or on the CPU by a
profile of all allocations.
"""

import argparse
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._functorch import config as functorch_config
from torch.profiler import ProfilerActivity, profile

from bench.contest import OUT_OF_MEMORY, why_failed
from bench.models import SIZES, default_size
from bench.roofline import Roofline, chosen_device, measure, record, result_file, times_ms
from e5core.backbone import BackboneConfig
from e5core.cards import MIB

MODES = ("forward", "backward", "both")
COMPILED, REFERENCE = "torch.compile", "eager torch"
Function = Callable[..., Tensor | tuple[Tensor, ...]]


class Work(NamedTuple):
    """The least that a pass must do."""

    n_bytes: float
    flops: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Case:
    """One op at one shape in one dtype.

    inputs: those that take a gradient.  reference: the definition, which is also timed as eager torch and compiled;
    None: it does not fit into memory.  ours: implementations by name.  unchecked: others to compare with, which may do
    less.  forward, backward: the least work.
    """

    shape: str
    inputs: Sequence[Tensor]
    reference: Function | None
    ours: dict[str, Function]
    unchecked: dict[str, Function] = field(default_factory=dict)
    forward: Work
    backward: Work = Work(0)
    modes: tuple[str, ...] = MODES
    not_compiled: str | None = None  # why the reference is not compiled
    columns: int | None = None  # of the first input that count; the others are spare
    excluded: dict[str, int] = field(default_factory=dict)  # bytes by implementation that are no extra memory
    limits_ms: dict[str, float] = field(default_factory=dict)  # by implementation, of both passes


@dataclass(frozen=True)
class Settings:
    """What an op's file makes its cases from."""

    device: torch.device
    dtype: torch.dtype
    size: str
    n_tokens: Sequence[int]

    @property
    def config(self) -> BackboneConfig:
        """The decoder whose shapes are taken."""
        return SIZES[self.size]

    def randn(self, *shape: int) -> Tensor:
        """Draw values anew, on the device."""
        return torch.randn(*shape, device=self.device).to(self.dtype)


def run(op: str, cases: Callable[[Settings], Iterator[Case]], argv: Sequence[str] | None = None) -> int:
    """Run an op's bench from its command line.  Returns the exit status: 1 where a check failed."""
    parser = argparse.ArgumentParser(prog=f"python -m bench.{op}", description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--size", choices=SIZES, help="of the decoder (default: 7b on CUDA, 135m on a CPU)")
    parser.add_argument("--tokens", type=int, nargs="+", help="of a micro-batch (default: 8192 on CUDA, 1024 on a CPU)")
    dtypes = ("float32", "bfloat16")
    parser.add_argument("--dtypes", nargs="+", choices=dtypes, help="default: bfloat16 on CUDA, float32 on a CPU")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out, which takes its time")
    parser.add_argument("--rep-ms", type=float, default=100.0, help="for which a call is repeated")
    parser.add_argument("--out", type=Path, help="JSON-lines file to append to (default: bench/results/DEVICE.jsonl)")
    arguments = parser.parse_args(argv)
    device = chosen_device(arguments.device)
    on_gpu = device.type == "cuda"
    size, tokens = arguments.size or default_size(device), arguments.tokens or [8192 if on_gpu else 1024]
    chosen = [getattr(torch, name) for name in arguments.dtypes or ["bfloat16" if on_gpu else "float32"]]
    out, failed = result_file(arguments.out, device), 0
    skipped = "left out by --no-compile" if arguments.no_compile else None
    roofline = measure(device, chosen, size, max(tokens))
    # a backward pass that is timed again and again must keep what it reads
    functorch_config.donated_buffer = False
    for dtype in chosen:
        for case in cases(Settings(device, dtype, size, tokens)):
            for row in rows_of(case, roofline, device, skipped, arguments.rep_ms):
                failed += row.get("check") == "failed" or row.get("failed", OUT_OF_MEMORY) != OUT_OF_MEMORY
                named = {"bench": op, "op": op, "shape": case.shape, "dtype": str(dtype).removeprefix("torch.")}
                record(named | row, device, out)
    return int(failed > 0)


def rows_of(
    case: Case, roofline: Roofline, device: torch.device, skipped: str | None, rep_ms: float
) -> Iterator[dict[str, Any]]:
    """Yield the rows of a case, each as soon as it is known: eager torch, torch.compile, ours.

    skipped: why nothing is compiled.
    """
    eager: dict[str, float] = {}
    implementations: dict[str, Function] = {}
    if case.reference is not None:
        implementations[REFERENCE] = case.reference
        if why := skipped or case.not_compiled:
            yield {"implementation": COMPILED, "skipped": why}
        else:
            torch.compiler.reset()  # or the shapes of this case would be taken for dynamic ones
            implementations[COMPILED] = torch.compile(case.reference, dynamic=False)
    for name, function in (implementations | case.ours | case.unchecked).items():
        shared: dict[str, Any] = {"implementation": name}
        if skipped and name.startswith(COMPILED):
            yield shared | {"skipped": skipped}
            continue
        try:
            if case.reference is not None and name in (COMPILED, *case.ours):
                shared |= check(case, function)
            for mode in case.modes:
                row = shared | _timed(case, name, function, mode, roofline, device, rep_ms)
                if name == REFERENCE:
                    eager[mode] = row["ms"]
                elif mode in eager:
                    row |= {"x_over_eager": round(eager[mode] / row["ms"], 2)}
                yield row
        except Exception as error:  # of whatever kind: it is told, with its traceback, and the others are timed
            yield shared | {"failed": why_failed(error)}
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _timed(
    case: Case, name: str, function: Function, mode: str, roofline: Roofline, device: torch.device, rep_ms: float
) -> dict[str, Any]:
    dtype = case.inputs[0].dtype
    call = passes(case, function, mode)
    ms, low, high = times_ms(call, device, rep_ms)
    works = {"forward": [case.forward], "backward": [case.backward], "both": [case.forward, case.backward]}[mode]
    n_bytes, flops = (sum(column) for column in zip(*works, strict=True))
    floor = roofline.floor_ms(n_bytes, flops, dtype)
    row: dict[str, Any] = {"mode": mode, "ms": _short(ms), "p20_ms": _short(low), "p80_ms": _short(high)}
    if flops / roofline.flops[dtype] > n_bytes / roofline.bytes_per_s:
        row |= {"tflop_per_s": _short(flops / ms / 1e9)}
    else:
        row |= {"gb_per_s": _short(n_bytes / ms / 1e6)}
    row |= {"floor_ms": _short(floor), "roofline_percent": round(100 * floor / ms, 1)}
    extra = allocations(call, device)[1] - case.excluded.get(name, 0) * (mode == "both")
    row |= {"extra_mib": round(max(0, extra) / MIB, 2)}  # what is excluded is not all there at the peak
    if mode == "both" and name in case.limits_ms:
        row |= {"limit_ms": _short(case.limits_ms[name]), "limit": "pass" if ms <= case.limits_ms[name] else "fail"}
    return row


def passes(case: Case, function: Function, mode: str) -> Callable[[], object]:
    """Return the call that a mode times."""
    if case.modes == ("forward",):
        return lambda: function(*case.inputs)
    leaves = [x.detach().requires_grad_() for x in case.inputs]
    outputs = outputs_of(function(*leaves))
    gs = [torch.randn_like(out) for out in outputs]
    if mode == "forward":
        return lambda: function(*leaves)
    if mode == "both":
        return lambda: torch.autograd.grad(outputs_of(function(*leaves)), leaves, gs, allow_unused=True)
    return lambda: torch.autograd.grad(outputs, leaves, gs, retain_graph=True, allow_unused=True)


def outputs_of(returned: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Wrap what an op returned, where it is one tensor."""
    return (returned,) if isinstance(returned, Tensor) else tuple(returned)


def check(case: Case, function: Function) -> dict[str, Any]:
    """Hold a function to the reference.  Returns its largest error over what is allowed, and the verdict."""
    dtype = case.inputs[0].dtype
    wide = torch.float64 if dtype == torch.float32 else torch.float32
    with torch.no_grad():
        gs = [torch.randn_like(out) for out in outputs_of(function(*case.inputs))]
    truth = _results(case, case.reference, wide, gs)
    plain = _results(case, case.reference, dtype, gs)
    worst = 0.0
    for i, got in enumerate(_results(case, function, dtype, gs)):
        allowed = 2 * (plain[i].to(wide) - truth[i]).abs().max() + 1e-5
        error = (got.to(wide) - truth[i]).abs().max()
        worst = max(worst, float("inf") if error.isnan() else (error / allowed).item())
    return {"check": "passed" if worst <= 1 else "failed", "error_of_allowed": round(worst, 3)}


def _results(case: Case, function: Function, dtype: torch.dtype, gs: Sequence[Tensor]) -> list[Tensor]:
    if case.modes == ("forward",):
        with torch.no_grad():
            return [*outputs_of(function(*(x.to(dtype) for x in case.inputs)))]
    leaves = [x.detach().to(dtype).requires_grad_() for x in case.inputs]
    outputs = outputs_of(function(*leaves))
    upstream = [g.to(out.dtype) for g, out in zip(gs, outputs, strict=True)]
    first, *others = torch.autograd.grad(outputs, leaves, upstream)
    return [*(out.detach() for out in outputs), first[:, : case.columns] if case.columns else first, *others]


def allocations(function: Callable[[], object], device: torch.device) -> tuple[int, int]:
    """Return the bytes that a call leaves allocated, and the most that live during it, both beyond those before."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        return torch.cuda.memory_allocated(device) - before, torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        function()
    events = enumerate(profiled.profiler.kineto_results.events())
    live = peak = 0
    for _, _, n_bytes in sorted((e.start_ns(), i, e.nbytes()) for i, e in events if e.name() == "[memory]"):
        live += n_bytes
        peak = max(peak, live)
    return live, peak


def _short(value: float) -> float:
    return float(f"{value:.4g}")
