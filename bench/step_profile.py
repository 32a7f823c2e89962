"""Where a training step's time goes, by kind of kernel, beside the floor of each: python -m bench.step_profile.

    python -m bench.step_profile [--device cuda] [--random 7b] [--triples 64] [--dropout 0.1] [--variant backbone.K=V]

One step of bench/step_rows.py under torch.profiler: on CUDA its kernels by name, on a CPU its ops' own time. The
update is profiled apart, so that its elementwise kernels are not taken for the model's. "gemm" holds all products of a
library, those of the adapters and of the loss among them; what adapters cost in kernels of their own is "lora". A floor
is the bytes that a kind must move at the copy's rate, or its FLOPs at the best product's, both measured in the same
run; of gemm it is the limit of bench/step_limit.py. Copies that should not be are listed by name: concatenations
(CatArray) and strided elementwise copies. Lawful are two concatenations a step, of the embeddings and of their rows.
"""

import argparse
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from bench.models import linears, random_model
from bench.roofline import Roofline, measure, record, result_file, synchronize
from bench.step_rows import Bench, Variant, bench_of, limit_seconds, own_step, parser_of, variants
from e5core.backbone import BackboneConfig
from e5core.batches import MicroBatch, pack
from e5core.lora import READERS, LoraConfig

# The first pattern that is found in a kernel's or an op's name decides.
KINDS = (
    ("concatenation", r"CatArray|aten::cat$|aten::stack$"),
    ("attention", r"attention|flash|fmha|aten::_scaled_dot"),
    ("norm", r"rms_norm"),
    ("rope", r"rope"),
    ("swiglu", r"glu|silu"),
    ("lora", r"lora"),
    ("infonce", r"infonce|logsumexp"),
    ("dropout", r"dropout"),
    ("last token", r"last_token"),
    ("quantisation", r"fp8|quantis|quantiz"),
    ("gemm", r"gemm|gemv|splitk|nvjet|cutlass|cublas|matmul|wgmma|aten::(mm|addmm|addmm_|bmm|linear|_scaled_mm)$"),
    ("sums", r"functor_add|aten::add_?$"),  # of the residual stream and of gradients
    ("copies", r"copy|memcpy|memset|aten::(copy_|clone|contiguous|_to_copy|fill_|zero_)$|fillfunctor"),
)
OTHER, UPDATE = "other", "update"
# A strided copy is elementwise_kernel; one of contiguous rows vectorized_ or unrolled_elementwise_kernel.
UNWANTED = re.compile(r"CatArray|aten::cat$|(?<![a-z_])elementwise_kernel<.*copy")


class Part(NamedTuple):
    """One kernel or op, all its calls."""

    name: str
    calls: int
    ms: float


def kind_of(name: str) -> str:
    """Say what kind of work a kernel or an op is."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, name, re.IGNORECASE)), OTHER)


def profiled(function: Callable[[], object], device: torch.device) -> list[Part]:
    """Run a function once under the profiler.  Returns its kernels, or on a CPU its ops with their own time."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]
    with profile(activities=activities) as run:
        function()
        synchronize(device)
    if not on_gpu:
        return [Part(e.key, e.count, e.self_cpu_time_total / 1e3) for e in run.key_averages() if e.self_cpu_time_total]
    calls, ms = defaultdict(int), defaultdict(float)
    for event in run.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            calls[event.name] += 1
            ms[event.name] += event.time_range.elapsed_us() / 1e3
    return [Part(name, calls[name], ms[name]) for name in ms]


def floors_ms(
    config: BackboneConfig, packed: Sequence[MicroBatch], roofline: Roofline, dtype: torch.dtype, limit_s: float
) -> dict[str, float]:
    """Return the least time of each kind in one step, in ms; a kind that should not be has 0.

    Counted for whole layers: the last one, which computes little, is left out of all but attention's k and v.
    """
    c, e = config, dtype.itemsize
    tokens = [len(piece.tokens) for piece in packed]
    forward, backward = 2 * sum(tokens) - max(tokens), sum(tokens)  # tokens that pass each way
    layers = c.n_layers - 1
    heads = (c.n_heads + c.n_kv_heads) * c.head_dim
    pairs = sum(int((n * (n + 1) // 2).sum()) for n in (piece.cu_seqlens.diff().long() for piece in packed))
    share = forward / backward
    attention_flops = layers * pairs * c.n_heads * c.head_dim * (4 * share + 10)
    inputs = {name: n_in for name, (n_in, _) in linears(c).items()}
    shared, each = sum(inputs[names[0]] for names in READERS), sum(inputs.values())
    n_bytes = {
        "norm": 2 * layers * c.dim * e * (2 * forward + 3 * backward),
        "rope": layers * heads * e * (2 * forward + 2 * backward),
        "swiglu": layers * c.hidden_dim * e * (3 * forward + 5 * backward),
        "lora": layers * e * (shared * forward + (2 * shared + each) * backward),  # x; x, every dx, and their sum
        "last token": 2 * sum(len(piece.rows) for piece in packed) * c.dim * e,
    }
    floors = {kind: 1e3 * moved / roofline.bytes_per_s for kind, moved in n_bytes.items()}
    moved = layers * 2 * heads * e * (forward + 2 * backward)
    floors["attention"] = roofline.floor_ms(moved, attention_flops, dtype)
    return floors | {"gemm": 1e3 * limit_s, "concatenation": 0.0}


def rows_of(step: Sequence[Part], update: Sequence[Part], floors: dict[str, float]) -> list[dict[str, object]]:
    """Sum the parts up by kind, the largest first; then name every copy that should not be."""
    ms, calls = defaultdict(float), defaultdict(int)
    for part in step:
        ms[kind_of(part.name)] += part.ms
        calls[kind_of(part.name)] += part.calls
    ms[UPDATE], calls[UPDATE] = sum(part.ms for part in update), sum(part.calls for part in update)
    total, rows = sum(ms.values()), []
    for kind in sorted(ms, key=lambda kind: -ms[kind]):
        row: dict[str, object] = {"kind": kind, "ms": round(ms[kind], 3), "calls": calls[kind]}
        row |= {"percent": round(100 * ms[kind] / total, 1)}
        if kind in floors:
            row |= {"floor_ms": round(floors[kind], 3)}
        rows.append(row)
    unwanted = sorted((part for part in step if UNWANTED.search(part.name)), key=lambda part: -part.ms)
    for part in unwanted:
        rows.append({"unwanted": part.name[:200], "ms": round(part.ms, 3), "calls": part.calls})
    return [*rows, {"unwanted_copies": sum(part.calls for part in unwanted)}]


def largest_of(step: Sequence[Part], kind: str, n: int = 8) -> list[dict[str, object]]:
    """Name the kernels of a kind that take most, for whom OTHER is to be looked into."""
    found = sorted((part for part in step if kind_of(part.name) == kind), key=lambda part: -part.ms)
    return [{"kind": kind, "name": p.name[:120], "ms": round(p.ms, 3), "calls": p.calls} for p in found[:n]]


def main() -> None:
    """Profile one step of every form of ours on the first number of triples."""
    parser = parser_of(__doc__)
    parser.set_defaults(triples=[64], random=None)
    parser.add_argument("--micro-batch-tokens", type=int, default=8192)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--out", type=Path, help="JSON-lines file to append to (default: bench/results/DEVICE.jsonl)")
    arguments = parser.parse_args()
    arguments.random = arguments.random or ("7b" if torch.cuda.is_available() else "135m")
    bench = bench_of(arguments)
    out = result_file(arguments.out, bench.device)
    roofline = measure(bench.device, [bench.dtype], arguments.random, arguments.micro_batch_tokens)
    for form in variants(arguments, bench.device):
        for row in profile_rows(bench, form, arguments, roofline):
            named = {"bench": "step_profile", "mode": f"ours {form.name}", "size": arguments.random}
            record(named | row, bench.device, out)


def profile_rows(
    bench: Bench, form: Variant, arguments: argparse.Namespace, roofline: Roofline
) -> list[dict[str, object]]:
    """Warm a step up and profile it."""
    lora, budget = LoraConfig(dropout=arguments.dropout), arguments.micro_batch_tokens
    model = random_model(bench.config, form.source, lora, bench.dtype, bench.device)
    batch = bench.batch(arguments.triples[0])
    packed = pack(batch.sequences, budget, bench.device)
    step, update = own_step(model, batch, budget)
    step(), update()
    parts, updated = profiled(step, bench.device), profiled(update, bench.device)
    floors = floors_ms(bench.config, packed, roofline, bench.dtype, limit_seconds(bench, form, packed))
    rows = rows_of(parts, updated, floors) + largest_of(parts, OTHER)
    return [{"triples": arguments.triples[0], "dropout": arguments.dropout} | row for row in rows]


if __name__ == "__main__":
    main()
