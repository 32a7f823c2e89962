"""Hold a plan's memory against a step's: python -m bench.plan [--config CONFIG] [--tokens 2048 8192].

A model of the config's sizes with random weights does one step, of two micro-batches of --tokens, under each recompute
policy; predicted is the ledger of e5core.memory, measured what torch's allocator held at most: CUDA's own count, or on
the CPU all allocations of a profile added up. No weights are read: config.json or a .gguf file's head is enough.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import get_args

import torch

from bench.models import filled_model
from bench.op import peak_bytes
from bench.roofline import device_name, record
from e5core.batches import GlobalBatch, pack
from e5core.cards import MIB
from e5core.config import load_config
from e5core.encoder import EmbeddingModel, choose_dtype
from e5core.lora import adapters
from e5core.loss import LossConfig
from e5core.memory import Load, Ranks, Setting, ledger, sizes_of
from e5core.optim import AdamW, OptimConfig
from e5core.recompute import Policy
from e5core.run import Config
from e5core.step import backward_step
from e5core.weights import resolve_model
from e5kernels.infonce import Relations

LENGTH = 128  # of a text


def random_batch(n_tokens: int, vocab_size: int) -> GlobalBatch:
    """Make pairs of random texts, n_tokens in all."""
    n = n_tokens // LENGTH // 2
    ids = torch.randint(0, vocab_size, (2 * n, LENGTH), generator=torch.Generator().manual_seed(0)).tolist()
    index, is_open = torch.arange(n), torch.ones(n, dtype=torch.bool)
    relations = Relations(index, index, index, -1 - index[:, None], index, is_open, is_open)
    names = [str(i) for i in range(n)]
    return GlobalBatch(ids, list(range(2 * n)), relations, [list(range(n))], [None] * n, names, 0)


def measured_bytes(model: EmbeddingModel, batch: GlobalBatch, budget: int, device: torch.device) -> int:
    """Do a step with AdamW's moments there.  Returns the bytes that were live at the peak."""
    optimizer = AdamW({name: p for name, p in model.named_parameters() if p.requires_grad}, OptimConfig())
    held = sum(part.values.nbytes for part in optimizer.state().values()) + sum(p.nbytes for p in model.parameters())
    if device.type == "cuda":
        held = torch.cuda.memory_allocated(device)
    return held + peak_bytes(lambda: backward_step(model, batch, LossConfig(), budget, (0, 0)), device)


def main() -> None:
    """Measure every policy at every micro-batch size, a row each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--config", type=Path, default=Path("configs/smollm2.toml"), help="whose backbone and adapters")
    parser.add_argument("--model", help="in place of the config's backbone.path; config.json is enough")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096], help="of a micro-batch")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--out", type=Path, help="JSON-lines file to append to (default: bench/results/DEVICE.jsonl)")
    arguments = parser.parse_args()
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    config = load_config(Config, arguments.config)
    if arguments.model:
        config = replace(config, backbone=replace(config.backbone, path=arguments.model))
    dtype, _ = choose_dtype(config.backbone.dtype, device)
    out = arguments.out or Path(f"bench/results/{device_name(device)}.jsonl")
    for policy in get_args(Policy):
        path = resolve_model(config.backbone.path)
        model = filled_model(path, config.backbone, config.lora, dtype, device, policy)
        sizes = sizes_of(model.backbone.config, config.lora)
        assert sum(1 for _ in adapters(model.backbone)) == len(config.lora.targets) * sizes.config.n_layers
        for n_tokens in arguments.tokens:
            batch = random_batch(2 * n_tokens, sizes.config.vocab_size)
            pieces = [len(piece.tokens) for piece in pack(batch.sequences, n_tokens, device)]
            n = batch.n_queries
            load = Load(pieces[0], pieces[1], batch.n_tokens, 2 * n, n, n)
            lines = ledger(sizes, Setting("none", n_tokens, policy), Ranks(1), load, dtype, device)
            predicted, measured = sum(lines.values()), measured_bytes(model, batch, n_tokens, device)
            row = {"bench": "plan", "model": Path(config.backbone.path).name, "dtype": str(dtype), "recompute": policy}
            row |= {"micro_batch_tokens": n_tokens, "predicted_mib": round(predicted / MIB, 1)}
            row |= {"measured_mib": round(measured / MIB, 1), "ratio": round(predicted / measured, 4)}
            record(row, device, out)
            model.zero_grad()
        del model


if __name__ == "__main__":
    main()
