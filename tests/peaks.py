"""What a tiny model's step allocates, beside what its ledger says."""

from collections.abc import Callable
from pathlib import Path

import torch
from models import SIZES, VARIANTS, randomised, save_embedder
from tiny_runs import batch_of

from bench.op import allocations
from e5core.batches import pack
from e5core.encoder import EmbeddingModel, Pooling, build_model
from e5core.lora import LoraConfig
from e5core.loss import LossConfig
from e5core.memory import Load, Ranks, Setting, ledger, sizes_of
from e5core.recompute import Policy
from e5core.step import backward_step

CPU = torch.device("cpu")
BEFORE = ("frozen weights", "adapters (fp32)", "masters (fp32)", "AdamW's moments")  # a step


def save_wider(variant: str, folder: Path) -> Path:
    """Save a tiny model whose proportions are a real one's, with a tokenizer."""
    save_embedder(folder)
    config_class, model_class, changes = VARIANTS[variant]
    sizes = SIZES | changes | {"vocab_size": 259, "bos_token_id": 257, "eos_token_id": 258, "pad_token_id": None}
    sizes |= {"hidden_size": 96, "intermediate_size": 288, "max_position_embeddings": 512}
    torch.manual_seed(0)
    randomised(model_class(config_class(**sizes))).save_pretrained(folder)
    return folder


def allocated_peak(run: Callable[[], object]) -> int:
    """Return the most bytes of torch's CPU allocator that were live during a run."""
    return allocations(run, CPU)[1]


def built(
    folder: Path,
    policy: Policy,
    dropout: float,
    dtype: torch.dtype = torch.float32,
    pooling: Pooling = "last",
    fp8_skip: tuple[str, ...] | None = None,
    full: bool = False,
) -> EmbeddingModel:
    lora = None if full else LoraConfig(rank=4, dropout=dropout)
    form = {"pooling": pooling, "fp8_skip": fp8_skip, "full": full}
    return build_model(folder, dtype, CPU, causal=True, lora=lora, seed=0, recompute=policy, **form)


def predicted_over_counted(
    folder: Path,
    policy: Policy,
    budget: int,
    dropout: float = 0.1,
    dtype: torch.dtype = torch.float32,
    pooling: Pooling = "last",
    fp8_skip: tuple[str, ...] | None = None,
    full: bool = False,
    device: torch.device = CPU,
) -> float:
    """Hold the ledger, less what was there before the step, against the allocations of a step.

    device: that the ledger is for.
    """
    model, batch = built(folder, policy, dropout, dtype, pooling, fp8_skip, full), batch_of(folder, n=16)
    counted = allocated_peak(lambda: backward_step(model, batch, LossConfig(), budget, (0, 0)))
    pieces = sorted((len(piece.tokens) for piece in pack(batch.sequences, budget, CPU)), reverse=True)
    load = Load(pieces[0], (*pieces, 0)[1], batch.n_tokens, len(batch.sequences), 16, 32)
    sizes = sizes_of(model.backbone.config, None if full else LoraConfig(rank=4, dropout=dropout), pooling, fp8_skip)
    lines = ledger(sizes, Setting("none", budget, policy), Ranks(1), load, dtype, device)
    trained = sum(p.numel() * p.element_size() for p in model.trained().values())
    held = {"adapters (fp32)": trained, "AdamW's moments": 2 * trained}
    held["frozen weights"] = sum(p.untyped_storage().nbytes() for p in model.parameters() if not p.requires_grad)
    if full:
        held = {"masters (fp32)": trained, "AdamW's moments": 2 * trained}
    assert {name: lines.pop(name) for name in BEFORE if name in lines} == held
    return sum(lines.values()) / counted
