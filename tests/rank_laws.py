"""What every rank of tests/test_distributed.py does; it imports little, since every process imports it anew."""

import json
import random
import shutil
import string
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.nn.functional
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from e5core import checkpoint
from e5core.batches import BatchConfig, build_batch, pack
from e5core.config import load_config
from e5core.distributed import World, check_same, gather_rows, share, sum_over_ranks
from e5core.encode import Encoder
from e5core.encoder import EmbeddingModel, build_model
from e5core.lora import LoraConfig, adapters
from e5core.loss import LossConfig
from e5core.mixture import DataConfig, Source, load_mixture
from e5core.optim import AdamW, OptimConfig
from e5core.records import Record
from e5core.step import backward_step
from e5core.tokenizer import Tokenizer
from e5core.train import Config, train

CPU = torch.device("cpu")
LORA = LoraConfig(rank=4, dropout=0.1)
LOSS = LossConfig(temperature=0.5)  # keeps the loss of a random model unsaturated
BUDGETS = (100, 10_000)  # tokens of a micro-batch: many, and one a rank
TEXTS = ["", "a", "the tram", "word " * 30, "Straße", "猫", "a", "x" * 70, "\n", "🦊 jumps"]


def text(length: int, number: int) -> str:
    return "".join(random.Random(number).choices(string.ascii_lowercase + " ", k=length))


def record(i: int, query: str, positives: tuple[str, ...], negatives: tuple[str, ...]) -> Record:
    return Record(id=f"r{i}", task="Find it.", query=query, positives=positives, negatives=negatives, source="test")


def made_records(n: int) -> list[Record]:
    """Records of unlike sizes, of which the first has one text that weighs as much as many others."""
    lengths = [(15, 390), (30, 40, 50), (20, 25), (60, 10, 20, 30), (5, 5), (45, 80), (70, 33, 12)]
    records = []
    for i in range(n):
        query, *candidates = (text(length, 10 * i + k) for k, length in enumerate(lengths[i % len(lengths)]))
        negatives = tuple(candidates[1:])
        records.append(record(i, query, (candidates[0],), negatives))
    if n > 4:
        records[2] = replace(records[2], in_batch=False)
        records[3] = replace(records[3], positives=(*records[3].positives, *records[1].positives))
    return records


def fresh_model(embedder: str, dtype: torch.dtype) -> EmbeddingModel:
    model = build_model(Path(embedder), dtype, CPU, causal=True, lora=LORA, seed=0)
    generator = torch.Generator().manual_seed(1)
    for _, linear in adapters(model.backbone):
        linear.lora_b.data.normal_(0, 0.1, generator=generator)
    return model


def measured(world: World, embedder: str, n_records: int, store: str) -> dict[str, Any]:
    """Do everything of one spawn, most of which a world of one can do too."""
    steps = {(dtype, budget): step(world, embedder, n_records, dtype, budget) for dtype in DTYPES for budget in BUDGETS}
    return {
        "steps": steps,
        "vectors": vectors(world, embedder),
        "gathered": gathered(world),
        "shared": share({"rank": world.rank, "tram": "Straße" * world.rank, "half": 0.5}, world),
        "different": refusal(check_same, {"same": 1, "mine": min(world.rank, 1)}, world),
        "broken": refusal(step, world, embedder, n_records, "float32", 100, True),
        "epochs": epochs(world, Path(store)),
        "patterns": patterns(world),
        "beside ddp": beside_ddp(world, embedder, 5) if world.world_size > 1 else None,
    }


DTYPES = {"float64": torch.float64, "float32": torch.float32}


def step(world: World, embedder: str, n_records: int, dtype: str, budget: int, broken: bool = False) -> dict[str, Any]:
    config = BatchConfig(size=n_records, max_tokens=400, negatives=2)
    batch = build_batch(made_records(n_records), Tokenizer.load(Path(embedder)), config, seed=1, step=4, world=world)
    model = fresh_model(embedder, DTYPES[dtype])
    if broken and world.is_main:
        model.backbone.tok_embeddings.weight.data[batch.sequences[0][3]] = torch.nan
    result = backward_step(model, batch, LOSS, budget, (7, 4), world)
    return {
        "gradient": torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]).numpy(),
        "figures": [value.item() for value in result],
        "n_micro_batches": len(pack(batch.sequences, budget, CPU)),
        "rows": batch.rows,
        "tokens": sum_over_ranks(torch.tensor([batch.n_tokens, batch.n_truncated]), world).tolist(),
    }


def vectors(world: World, embedder: str) -> list[np.ndarray]:
    """Embed fewer texts than ranks, a few, and several chunks with a short last one."""
    encoder = Encoder(fresh_model(embedder, torch.float32), Tokenizer.load(Path(embedder)), CPU, 64, world)
    found = [encoder.encode(TEXTS[:n]) for n in (1, 2, 3)]
    found.append(encoder.encode(TEXTS, task="Find it.", normalize=False))
    encoder.chunk = 2 * world.world_size
    found.append(encoder.encode(TEXTS))
    return [*found, np.array([encoder.n_truncated]), encoder.golden_vectors()]


def gathered(world: World) -> dict[str, Any]:
    """Gather rank rows of each rank (none of rank 0's), dealt at random, and send a gradient back to them."""
    generator = torch.Generator().manual_seed(0)
    n_rows = sum(range(world.world_size)) or 3
    order = torch.randperm(n_rows, generator=generator)
    counts = list(range(world.world_size)) if world.world_size > 1 else [3]
    places = [part.tolist() for part in (order if world.world_size > 1 else order.sort()[0]).split(counts)]
    rows = torch.randn(n_rows, 5, generator=generator, dtype=torch.float64)
    weights = torch.randn(world.world_size, n_rows, 5, generator=generator, dtype=torch.float64)
    own = rows[places[world.rank]].requires_grad_()
    together = gather_rows(own, places, world)
    total = sum_over_ranks((together * weights[world.rank]).sum(), world)
    (gradient,) = torch.autograd.grad(total, own)
    wanted = weights.sum(0)[places[world.rank]]
    return {
        "equal": torch.equal(together, rows),
        "total": abs(total.item() - (rows * weights).sum().item()),
        "gradient": (gradient - wanted).abs().max().item() if len(own) else 0.0,
    }


def refusal(function: Callable[..., object], *arguments: object) -> str:
    try:
        function(*arguments)
    except (ValueError, FileExistsError, FloatingPointError) as error:
        return str(error)
    return ""


def epochs(world: World, store: Path) -> list[list[str]]:
    """Draw two epochs from a store that grows between the moments when two ranks reach the second."""
    lines = [json.dumps({"task": "t", "query": f"q{i}", "pos": [f"p{i}"], "neg": []}) + "\n" for i in range(9)]
    if world.is_main:
        store.mkdir(parents=True)
        (store / "0.jsonl").write_text("".join(lines[:4]))
    share(None, world)
    mixture, _ = load_mixture(DataConfig(sources=(Source(path=str(store)),)), 3, (), world)
    first = [record.query for record in mixture.batch(0, 4)]
    share(None, world)
    if world.rank == world.world_size - 1 and world.world_size > 1:
        time.sleep(0.5)  # rank 0 has looked by then, and waits
        (store / "1.jsonl").write_text("".join(lines[4:]))
    return [first, [record.query for record in mixture.batch(1, 4)]]


def patterns(world: World) -> dict[str, tuple[float, float]]:
    """Measure (scale, cosine) of the gradient against one process: ours, and the patterns of others under DDP."""
    generator = torch.Generator().manual_seed(0)
    n, dim = 3 * world.world_size, 12
    x, y = (torch.randn(n, dim, generator=generator, dtype=torch.float64) for _ in range(2))
    start = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    own = list(range(3 * world.rank, 3 * world.rank + 3))
    places = [list(range(3 * rank, 3 * rank + 3)) for rank in range(world.world_size)]

    def unit(rows: Tensor, weight: Tensor) -> Tensor:
        return F.normalize(rows @ weight, dim=1)

    def entropy(queries: Tensor, candidates: Tensor, targets: list[int]) -> Tensor:
        return F.cross_entropy(queries @ candidates.T / LOSS.temperature, torch.tensor(targets))

    def own_slice(rows: Tensor) -> Tensor:
        """Gather, as dist.all_gather does, without a gradient, and put the rank's own rows back."""
        whole = gather_rows(rows.detach(), places, world)
        return torch.cat([whole[: own[0]], rows, whole[own[-1] + 1 :]])

    def gradient(loss: Callable[[Tensor], Tensor]) -> Tensor:
        weight = start.clone().requires_grad_()
        return torch.autograd.grad(loss(weight), weight)[0]

    def local_rows(weight: Tensor) -> Tensor:
        return entropy(unit(x[own], weight), gather_rows(unit(y[own], weight), places, world), own)

    everything = list(range(n))
    truth = gradient(lambda w: entropy(unit(x, w), unit(y, w), everything))
    sums = {"ours": gradient(lambda w: sum_over_ranks(local_rows(w) * len(own) / n, world))}
    averaged = {
        "own slice, all rows": lambda w: entropy(own_slice(unit(x[own], w)), own_slice(unit(y[own], w)), everything),
        "own slice, local rows": lambda w: entropy(unit(x[own], w), own_slice(unit(y[own], w)), own),
        "gradient gather, times W": lambda w: local_rows(w) * world.world_size,
    }
    sums |= {name: gradient(loss) / world.world_size for name, loss in averaged.items()}
    found = {name: sum_over_ranks(part, world) for name, part in sums.items()}
    return {
        name: (float(g.norm() / truth.norm()), float(F.cosine_similarity(g.flatten(), truth.flatten(), dim=0)))
        for name, g in found.items()
    }


def beside_ddp(world: World, embedder: str, n_steps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Train by our step, and by torch's DDP, all_gather, cross entropy and AdamW.  Returns start and both ends."""
    tokenizer, config = Tokenizer.load(Path(embedder)), OptimConfig(clip=0.05)  # which clips
    ours, theirs = fresh_model(embedder, torch.float64), fresh_model(embedder, torch.float64)
    optimizer = AdamW({name: p for name, p in ours.named_parameters() if p.requires_grad}, config)
    trained = [p for p in theirs.parameters() if p.requires_grad]
    torch_optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=config.weight_decay)
    parallel = DistributedDataParallel(theirs, broadcast_buffers=False)
    begun = flat(ours)
    for number in range(n_steps):
        # texts of one length, since DDP's ranks must have as many each
        texts = [[text(20, 100 * number + 3 * i + k) for k in range(3)] for i in range(3 * world.world_size)]
        records = [record(i, query, (positive,), (negative,)) for i, (query, positive, negative) in enumerate(texts)]
        batch = build_batch(records, tokenizer, BatchConfig(), seed=1, step=number, world=world)
        backward_step(ours, batch, LOSS, 60, (7, number), world)
        optimizer.clip_gradients()
        optimizer.update(1e-2)
        (whole,) = pack(batch.sequences, 10_000, CPU, numbers=batch.rows)
        queries, candidates = parallel(whole, (7, number)).split([3, 6])
        everyone = torch.cat(torch.distributed.nn.functional.all_gather(candidates))
        targets = torch.arange(0, 6, 2) + 6 * world.rank
        F.cross_entropy(queries @ everyone.T / LOSS.temperature, targets).backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in trained])
        assert norm > config.clip
        for parameter in trained:  # clip_grad_norm_ adds 1e-6 to the norm
            parameter.grad.mul_(config.clip / norm)
        torch_optimizer.step()
        torch_optimizer.zero_grad()
    return begun, flat(ours), flat(theirs)


def flat(model: EmbeddingModel) -> np.ndarray:
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad]).numpy().copy()


def trainings(world: World, config_file: str, folder: str, other: str) -> list[str]:
    """Train; resume a copy cut to step 4; resume another world's run cut to step 4; and be refused."""
    run = Path(folder)
    config = load_config(Config, Path(config_file), [f"train.run='{run}'"])
    scores = train(config)
    for source, target in ((run, f"{run}-resumed"), (Path(other), f"{run}-of-another")):
        if world.is_main:
            cut_to(source, Path(target), 4)
        share(None, world)
        assert train(again(config, target)).keys() == scores.keys()
    few = replace(config, train=replace(config.train, run=f"{run}-few"), batch=replace(config.batch, size=1))
    optim = replace(config.optim, lr=2e-4 * (1 + world.rank))
    different = replace(config, train=replace(config.train, run=f"{run}-different"), optim=optim)
    return [refusal(train, refused) for refused in (few, different, config)]


def again(config: Config, run: str) -> Config:
    return replace(config, train=replace(config.train, run=run, resume=True))


def cut_to(run: Path, copy: Path, step: int) -> None:
    """Copy a run as it was when its last checkpoint was this step's."""
    shutil.copytree(run, copy)
    for later in (number for number in checkpoint.steps_of(copy) if number > step):
        shutil.rmtree(checkpoint.step_folder(copy, later))
