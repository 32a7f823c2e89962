"""What every rank of tests/test_sharding.py does; it imports little, since every process imports it anew."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn.functional
import torch.nn.functional as F
from rank_laws import CPU, DTYPES, LORA, LOSS, cut_to, made_records, record, text
from torch import Tensor
from torch.distributed.fsdp import fully_shard

from e5core.batches import BatchConfig, build_batch, pack
from e5core.config import load_config
from e5core.distributed import World, gather_rows, share
from e5core.encode import Encoder
from e5core.encoder import EmbeddingModel, build_model
from e5core.optim import OptimConfig
from e5core.recompute import Policy
from e5core.sharding import Shards, Strategy
from e5core.step import backward_step, make_optimizer
from e5core.tokenizer import Tokenizer
from e5core.train import Config, train
from e5core.weights import give_dtypes, load_weights, read_config
from e5kernels import attention, dropout, fp8, fp8_linear, last_token, lora_linear, rms_norm, rope, swiglu

N_STEPS = 3
OPTIM = OptimConfig(lr=1e-4, clip=0.05)  # which clips
BUDGETS = (110, 10_000)
CASES = (
    ("full", "float64", 110),
    ("full", "float64", 10_000),
    ("full", "float32", 110),
    ("hybrid", "float64", 110),
)


def sharded_model(
    world: World,
    embedder: str,
    strategy: Strategy,
    dtype: torch.dtype,
    recompute: Policy = "none",
    fp8_skip: tuple[str, ...] | None = None,
) -> EmbeddingModel:
    held = {"recompute": recompute, "strategy": strategy, "world": world, "fp8_skip": fp8_skip}
    model = build_model(Path(embedder), dtype, CPU, causal=True, lora=LORA, seed=0, **held)
    generator = torch.Generator().manual_seed(1)
    for name, master in list(model.masters()):
        if name.endswith("lora_b"):
            put(model, name, master.clone().normal_(0, 0.1, generator=generator))
    return model


def put(model: EmbeddingModel, name: str, values: Tensor) -> None:
    if model.put is None:
        model.backbone.get_parameter(name).data.copy_(values)
    else:
        model.put(name, values)


def whole(model: EmbeddingModel, parts: dict[str, Tensor]) -> np.ndarray:
    named = parts if model.shards is None else dict(model.shards.whole(parts))
    return torch.cat([named[name].flatten() for name in sorted(named)]).numpy().copy()


@contextmanager
def recorded() -> Iterator[dict[str, list[int]]]:
    """Record the bytes that each of torch's collectives takes from this rank, or brings to it."""
    calls: dict[str, list[int]] = {"gather": [], "scatter": [], "all_reduce": []}
    is_new = hasattr(dist, "all_gather_single")  # since torch 2.13
    names = (
        ("all_gather_single", "reduce_scatter_single")
        if is_new
        else ("all_gather_into_tensor", "reduce_scatter_tensor")
    )
    names += ("all_reduce",)
    gather, scatter, all_reduce = before = [vars(dist)[name] for name in names]

    def gathered(into: Tensor, own: Tensor, **others: Any) -> Any:
        calls["gather"].append(into.nbytes - own.nbytes)
        return gather(into, own, **others)

    def scattered(own: Tensor, whole: Tensor, **others: Any) -> Any:
        calls["scatter"].append(whole.nbytes - own.nbytes)
        return scatter(own, whole, **others)

    def reduced(total: Tensor, *arguments: Any, **others: Any) -> Any:
        calls["all_reduce"].append(total.nbytes)
        return all_reduce(total, *arguments, **others)

    vars(dist).update(zip(names, (gathered, scattered, reduced), strict=True))
    try:
        yield calls
    finally:
        vars(dist).update(zip(names, before, strict=True))


def training(
    world: World, embedder: str, strategy: Strategy, dtype: str, budget: int, recompute: Policy = "none"
) -> dict[str, Any]:
    """Train for some steps.  Returns losses, norms, the first gradient, the last adapters, and what was moved."""
    model = sharded_model(world, embedder, strategy, DTYPES[dtype], recompute)
    tokenizer, config = Tokenizer.load(Path(embedder)), BatchConfig(size=7, max_tokens=400, negatives=2)
    optimizer = make_optimizer(model, OPTIM)
    found: dict[str, Any] = {"losses": [], "norms": [], "n_micro_batches": [], "whole": whole_bytes(model.shards)}
    for step in range(N_STEPS):
        batch = build_batch(made_records(7), tokenizer, config, seed=1, step=step, world=world)
        with recorded() as calls:
            found["losses"].append(backward_step(model, batch, LOSS, budget, (7, step), world).loss.item())
        found["n_micro_batches"].append(len(pack(batch.sequences, budget, CPU)))
        if step == 0:
            found["gradient"] = whole(model, {name: p.grad for name, p in model.trained().items()})
            found["calls"] = calls
            found["traffic"] = None if model.shards is None else asdict(model.shards.traffic)
        found["norms"].append(optimizer.clip_gradients())
        optimizer.update(OPTIM.lr)
    found["adapters"] = whole(model, {name: p.detach() for name, p in model.trained().items()})
    moments = [{name: pair[i] for name, pair in optimizer.moments.items()} for i in (0, 1)]
    found["moments"] = np.concatenate([whole(model, moment) for moment in moments])
    found["storages"] = sum(p.untyped_storage().size() for p in model.parameters())
    found["gradients left"] = sum(p.grad is not None for p in model.parameters())
    found["kept"] = found["storages"] if model.shards is None else kept_bytes(model.shards)
    found["slices"] = {name: (part.start, len(part.values), part.shape) for name, part in optimizer.state().items()}
    return found


def whole_bytes(shards: Shards | None) -> list[int]:
    """Return a list of one number: how many bytes are gathered at once, at most from here on, the root's too."""
    most = [0]
    if shards is not None:
        gather = shards._gather

        def counted(unit: Any) -> None:
            gather(unit)
            storages = [flat.whole.untyped_storage() for each in shards._all() for flat in each.flats]
            most[0] = max(most[0], sum(storage.size() for storage in storages))

        shards._gather = counted
    return most


def kept_bytes(shards: Shards) -> int:
    return sum(flat.part.nbytes for unit in shards._all() for flat in unit.flats)


def four_ranks(world: World, embedder: str) -> dict[Any, Any]:
    """Train by the strategies, in both dtypes, in many micro-batches and in one, by all policies of recompute."""
    found: dict[Any, Any] = {case: training(world, embedder, *case) for case in CASES}
    for policy in ("mlp", "block"):
        found[policy] = training(world, embedder, "full", "float64", BUDGETS[0], policy)
    return found


def in_rooms(world: World, embedder: str, fp8_skip: tuple[str, ...] | None = None) -> dict[str, Any]:
    """As `small_steps`, by the kernels, whose weights have room behind them."""
    for room in (attention, dropout, fp8, fp8_linear, last_token, lora_linear, rms_norm, rope, swiglu):
        room.face = lambda device: "triton"
    return small_steps(world, embedder, "full", [world.rank], fp8_skip)


def small_steps(
    world: World, embedder: str, strategy: Strategy, numbers: list[int], fp8_skip: tuple[str, ...] | None = None
) -> dict[str, Any]:
    """Go twice down the gradient of some pieces of few tokens.  Returns the gradients, and the bytes that are kept."""
    model = sharded_model(world, embedder, strategy, torch.float32, fp8_skip=fp8_skip)
    found: dict[str, Any] = {"gradients": []}
    for step in range(2):
        for number in numbers:
            (piece,) = pack([list(range(3 + number, 3 + number + n)) for n in (2, 5 + 4 * number)], 1000, CPU)
            embeddings = model(piece, (5, step))
            (embeddings * torch.arange(embeddings.numel()).view_as(embeddings).cos()).sum().backward()
        if model.shards is not None:
            model.shards.reduce_gradients()
            model.shards.release()
        found["gradients"].append(whole(model, {name: p.grad for name, p in model.trained().items()}))
        for parameter in model.trained().values():
            parameter.data -= 0.01 * parameter.grad
            parameter.grad = None
    return found | {"kept": 0 if model.shards is None else kept_bytes(model.shards)}


def two_ranks(world: World, embedder: str, config_file: str) -> dict[str, Any]:
    trainings(world, Path(config_file))
    return {
        "vectors": vectors(world, embedder, "full"),
        "beside fully_shard": beside_fully_shard(world, embedder, 20),
        "fully trained": fully_trained(world, embedder, "full"),
    }


def in_fp8(world: World, embedder: str, strategy: Strategy) -> dict[str, Any]:
    """Embed a batch, the same on each rank, by a model in fp8, and go back.  Returns embeddings and gradient."""
    model = sharded_model(world, embedder, strategy, torch.float64, fp8_skip=("wo",))
    tokenizer, config = Tokenizer.load(Path(embedder)), BatchConfig(size=3, max_tokens=60)
    (batch,) = pack(build_batch(made_records(3), tokenizer, config, seed=1, step=0).sequences, 10_000, CPU)
    embeddings = model(batch, dropout=(1, 2))
    embeddings.backward(torch.linspace(-1, 1, embeddings.numel(), dtype=torch.float64).view(embeddings.shape))
    found: dict[str, Any] = {"embeddings": embeddings.detach().numpy().copy()}
    if model.shards is not None:
        model.shards.reduce_gradients()
        found["most_gathered"] = model.shards.traffic.most_gathered
    gradient = whole(model, {name: p.grad for name, p in model.trained().items()})
    return found | {"gradient": gradient / world.world_size}


def trainings(world: World, config_file: Path) -> None:
    """Train unsharded and sharded, and go on sharded with the first as it was at its second step."""
    folder = config_file.parent
    for strategy in ("none", "full"):
        train(load_config(Config, config_file, [f"train.run='{folder / strategy}'", f'sharding.strategy="{strategy}"']))
    if world.is_main:
        cut_to(folder / "none", folder / "resumed", 2)
    share(None, world)
    arguments = [f"train.run='{folder / 'resumed'}'", 'sharding.strategy="full"', "train.resume=true"]
    train(load_config(Config, config_file, arguments))


def vectors(world: World, embedder: str, strategy: Strategy) -> dict[str, Any]:
    """Encode one long text and five short ones, which two ranks deal so that they have 1 and 5 micro-batches."""
    encoder = Encoder(sharded_model(world, embedder, strategy, torch.float32), Tokenizer.load(Path(embedder)), CPU, 400)
    encoder.world, encoder.batch_tokens = world, 64
    n_forwards: list[int] = []
    encoder.model.register_forward_hook(lambda *_: n_forwards.append(1))
    texts = [text(350, 0), *(text(60, i) for i in range(1, 6))]
    with recorded() as calls:
        found = encoder.encode(texts)
    shards = encoder.model.shards
    storages = sum(p.untyped_storage().size() for p in encoder.model.parameters())
    return {
        "vectors": [found, encoder.encode(texts[:1]), encoder.encode(texts, task="Find it.")],
        "n_forwards": len(n_forwards) if world.world_size == 1 else None,
        "n_first": len(calls["gather"]),
        "storages": storages,
        "most": 0 if shards is None else shards.traffic.most_gathered,
    }


def beside_fully_shard(world: World, embedder: str, n_steps: int) -> dict[str, Any]:
    """Train by our sharded step, and by torch's fully_shard, all_gather, cross entropy and AdamW."""
    tokenizer = Tokenizer.load(Path(embedder))
    ours, theirs = (sharded_model(world, embedder, s, torch.float64) for s in ("full", "none"))
    begun = whole(ours, {name: p.detach() for name, p in ours.trained().items()})
    optimizer = make_optimizer(ours, OPTIM)
    for layer in theirs.backbone.layers:
        fully_shard(layer)
    fully_shard(theirs)
    trained = [p for p in theirs.parameters() if p.requires_grad]
    torch_optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=OPTIM.weight_decay)
    curves: tuple[list[float], list[float]] = ([], [])
    for number in range(n_steps):
        # texts of one length, since fully_shard's ranks must have as many each
        texts = [[text(20, 100 * number + 3 * i + k) for k in range(3)] for i in range(3 * world.world_size)]
        records = [record(i, query, (positive,), (negative,)) for i, (query, positive, negative) in enumerate(texts)]
        batch = build_batch(records, tokenizer, BatchConfig(), seed=1, step=number, world=world)
        curves[0].append(backward_step(ours, batch, LOSS, 60, (7, number), world).loss.item())
        optimizer.clip_gradients()
        optimizer.update(1e-3)
        (packed,) = pack(batch.sequences, 10_000, CPU, numbers=batch.rows)
        queries, candidates = theirs(packed, (7, number)).split([3, 6])
        everyone = torch.cat(torch.distributed.nn.functional.all_gather(candidates))
        loss = F.cross_entropy(queries @ everyone.T / LOSS.temperature, torch.arange(0, 6, 2) + 6 * world.rank)
        loss.backward()
        losses = torch.zeros(world.world_size, dtype=torch.float64)
        losses[world.rank] = loss.detach()
        dist.all_reduce(losses)
        curves[1].append(losses.mean().item())
        norm = torch.nn.utils.get_total_norm([p.grad for p in trained]).full_tensor()
        assert norm > OPTIM.clip
        for parameter in trained:  # clip_grad_norm_ adds 1e-6 to the norm
            parameter.grad.mul_(OPTIM.clip / norm)
        torch_optimizer.step()
        torch_optimizer.zero_grad()
    ended = {name: p.full_tensor().detach() for name, p in theirs.named_parameters() if p.requires_grad}
    return {
        "begun": begun,
        "ours": whole(ours, {name: p.detach() for name, p in ours.trained().items()}),
        "theirs": torch.cat([ended[name].flatten() for name in sorted(ended)]).numpy(),
        "curves": curves,
    }


def fully_trained(world: World, embedder: str, strategy: Strategy) -> dict[str, Any]:
    """Train all weights of a tiny model for some steps, of which ranks do unlike numbers of micro-batches."""
    path = Path(embedder)
    with torch.device("meta"):
        model = EmbeddingModel(read_config(path), None).requires_grad_(True)
    give_dtypes(model.backbone, torch.float64)
    if strategy == "full":
        alone = World(rank=0, world_size=1, device=CPU)
        model.shards = Shards(model, model.backbone.layers, world, alone, each_pass=True)
    load_weights(model.backbone, path, torch.float64, CPU, model.put)
    if strategy == "none":
        model.requires_grad_(True)
    optimizer = make_optimizer(model, OPTIM)
    tokenizer, n_passes, losses = Tokenizer.load(path), 4, []
    for step in range(N_STEPS):
        sequences, _ = tokenizer.encode_batch([text(20 + 9 * i, 50 * step + i) for i in range(n_passes)], 400)
        pieces = [pack([ids], 1, CPU, numbers=[i])[0] for i, ids in enumerate(sequences)]
        own = pieces if world.world_size == 1 else [pieces[:3], pieces[3:]][world.rank]
        target = torch.randn(n_passes, 32, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        total = torch.zeros((), dtype=torch.float64)
        for i in range(n_passes if world.world_size == 1 else 3):
            if i < len(own):
                loss = (model(own[i]) * target[own[i].rows]).sum()
                loss.backward()
                total += loss.detach()
            else:
                model.shards.idle(backward=True)
            if model.shards is not None:
                model.shards.reduce_gradients()
        if model.shards is not None:
            model.shards.release()
        losses.append(float(gather_rows(total[None], [[rank] for rank in range(world.world_size)], world).sum()))
        optimizer.clip_gradients()
        optimizer.update(OPTIM.lr)
    return {
        "losses": losses,
        "weights": whole(model, {name: p.detach() for name, p in model.trained().items()}),
        "reductions": None if model.shards is None else model.shards.traffic.n_reductions,
    }


def loaded(world: World, path: str, dtype: str) -> dict[str, int]:
    """Load a model in shards.  Returns by how many bytes the process's own memory grew meanwhile, and what it keeps."""
    before, ended, most = anonymous_bytes(), threading.Event(), [0]

    def watch() -> None:
        while not ended.wait(0.002):
            most[0] = max(most[0], anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    named = {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    held = {"strategy": "full", "world": world}
    model = build_model(Path(path), named, CPU, causal=True, lora=LORA, seed=0, **held)
    ended.set()
    watcher.join()
    largest = max(p.numel() for p in model.parameters())
    whole_bytes = sum(p.nbytes for p in model.parameters())
    shard = kept_bytes(model.shards)
    return {"growth": most[0] - before, "shard": shard, "largest": 4 * largest, "whole": whole_bytes}


def anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")))
