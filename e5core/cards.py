"""What a device can do, in one place: data sheets for GPUs, a measurement for this machine's CPU.

`efficiency` is the share of the matrix peak that a whole training step reaches. One figure of it is measured: two
passes at 10,300 real tokens/s by a bf16 prototype of this step on an H100 (Mistral-7B shapes, 8,192-token
micro-batches; DESIGN section 5), which is 10,300 * 6 * 6.98e9 = 431 of 989 TFLOP/s. Other GPUs are assumed to reach the
same share of their own peak, and NCCL LINK_EFFICIENCY of a link's.
"""

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

LINK_EFFICIENCY = 0.75  # assumed
FP8_GAIN_CPU = 0.84  # measured on one AVX512 thread: inputs are quantised and decoded, weights decoded, on top
MIB = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """A device; rates are a second's: FLOP (bf16, dense), bytes of its own memory, bytes of a link one way."""

    name: str
    kind: str  # "cuda" or "cpu"
    memory_mib: int  # what a process can have of it
    flops: float
    efficiency: float = 0.436  # measured on one H100, see above
    fp8_gain: float = 12_335 / 10_300  # of a step whose frozen linears are in fp8; measured there too; 0: has no fp8
    bandwidth: float  # of its memory
    link: float  # to the other cards of its node
    network: float  # to other nodes, a card's own share
    framework_mib: int = 1024  # CUDA's context, cuBLAS, Triton: outside torch's allocator; assumed
    group_mib: int = 512  # NCCL's buffers, where there are several ranks; assumed
    source: str = "data sheet"

    @property
    def rate(self) -> float:
        """FLOP a second that a step is assumed to reach."""
        return self.flops * self.efficiency


_H100 = Card(
    name="h100", kind="cuda", memory_mib=79_000, flops=989e12, bandwidth=3.35e12, link=450e9, network=50e9
)  # fmt: skip
_A100 = replace(
    _H100, name="a100-80", fp8_gain=0, memory_mib=79_000, flops=312e12, bandwidth=2.04e12, link=300e9, network=25e9
)
_4090 = replace(_H100, name="rtx4090", memory_mib=23_500, flops=165e12, bandwidth=1.01e12, link=32e9, network=12.5e9)
CARDS = {
    card.name: card
    for card in (
        _H100,
        replace(_H100, name="h200", memory_mib=141_000, bandwidth=4.8e12),
        _A100,
        replace(_A100, name="a100-40", memory_mib=39_000, bandwidth=1.56e12),
        _4090,
    )
}
_NAMES = {"NVIDIA H100": "h100", "NVIDIA H200": "h200", "NVIDIA A100": "a100-80", "NVIDIA GeForce RTX 4090": "rtx4090"}


def card_of(device: torch.device) -> Card:
    """Describe a device of this machine: its free memory, and its rate by name or, for a CPU, by a measurement."""
    if device.type == "cpu":
        return _this_cpu()
    name = torch.cuda.get_device_name(device)
    known = next((card for prefix, card in _NAMES.items() if name.startswith(prefix)), None)
    source = "data sheet" if known else "unknown GPU: the rates of an A100"
    free_mib = torch.cuda.mem_get_info(device)[0] // MIB
    gain = CARDS[known].fp8_gain if known else _H100.fp8_gain * (torch.cuda.get_device_capability(device) >= (8, 9))
    return replace(CARDS[known or "a100-80"], name=name, memory_mib=free_mib, fp8_gain=gain, source=source)


def _this_cpu() -> Card:
    flops = _gemm_rate()
    return Card(
        name="cpu", kind="cpu", memory_mib=_available_mib(), flops=flops, efficiency=0.8, bandwidth=10e9, link=5e9,
        network=1e9, framework_mib=400, group_mib=16, source="a matrix product on this machine, memory now available",
        fp8_gain=FP8_GAIN_CPU,
    )  # fmt: skip


def _gemm_rate() -> float:
    """Measure FLOP a second of a large fp32 product."""
    a, b = torch.ones(1024, 1536), torch.ones(1536, 1536)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * 1024 * 1536 * 1536 / best


def _available_mib() -> int:
    """Return what Linux calls available; elsewhere half of the memory that there is."""
    file = Path("/proc/meminfo")
    if file.is_file():
        fields = dict(line.split(":") for line in file.read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) // 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // MIB // 2
