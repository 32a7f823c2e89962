"""The embedding model: backbone + adapters + pooling + unit length (arXiv 2401.00368, section 3.1).

`build_model` makes it from files in the one right order: sizes, modules on the meta device, adapters, fp8, room for
adapters behind weights, shards, weights.
With last-token pooling the final norm and all that follows run on the last tokens only; the means (arXiv 1908.10084,
2202.08904) are of all tokens' normed states. Embeddings are unit rows in max(fp32, the backbone's dtype).
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from e5core.backbone import Backbone, BackboneConfig, positions_of
from e5core.batches import MicroBatch
from e5core.distributed import ALONE, World, log, share
from e5core.fp8 import ATTENTION, apply_fp8, check_fp8
from e5core.lora import LoraConfig, TokenKeys, apply_lora, init_lora, make_room
from e5core.recompute import Policy, apply_recompute
from e5core.rope_scaling import AS_TRAINED, LongContext, lengthened
from e5core.sharding import Shards, Slice, Strategy, settle_strategy, shard
from e5core.weights import give_dtypes, load_weights, read_config

Dtype = Literal["auto", "float32", "bfloat16"]
Pooling = Literal["last", "mean", "weighted_mean"]


@dataclass(frozen=True, kw_only=True, slots=True)
class BackboneSource:
    """The [backbone] table: which model, and how it is held."""

    path: Annotated[str, Field(min_length=1)]  # Hugging Face folder, .gguf file or package:NAME/FILE
    dtype: Dtype = "auto"  # of weights and activations; auto: bfloat16 on CUDA, on the CPU the faster of the two
    causal: bool = True  # false: bidirectional attention
    pooling: Pooling = "last"  # or the mean of all tokens, or that with the weights 1, 2, ..., n (SGPT)
    frozen_dtype: Literal["same", "fp8"] = "same"  # of the layers' linears; fp8: row-wise e4m3, their inputs too
    fp8_skip: tuple[str, ...] | None = None  # left in dtype under fp8: "w_down", "layers.0", "layers.0.attention.wq"

    def __post_init__(self) -> None:
        if self.fp8_skip and self.frozen_dtype != "fp8":
            raise ValueError(f'fp8_skip = {list(self.fp8_skip)} needs frozen_dtype = "fp8": got {self.frozen_dtype!r}')

    @property
    def skipped(self) -> tuple[str, ...] | None:
        """The linears that fp8 skips, attention's where the config names none; None without fp8."""
        if self.frozen_dtype != "fp8":
            return None
        return ATTENTION if self.fp8_skip is None else self.fp8_skip


class EmbeddingModel(nn.Module):
    """Packed tokens to unit vectors."""

    def __init__(
        self,
        config: BackboneConfig,
        lora: LoraConfig | None,
        recompute: Policy = "none",
        pooling: Pooling = "last",
        full: bool = False,
    ) -> None:
        """full: all weights are trained, and the model is sharded, be it over one rank (sharding.shard)."""
        super().__init__()
        self.backbone, self.pooling, self.full = Backbone(config).requires_grad_(full), pooling, full
        self.token_keys = TokenKeys() if lora is None else apply_lora(self.backbone, lora)
        apply_recompute(self.backbone, recompute, self.token_keys)
        self.shards: Shards | None = None  # where each rank keeps a slice of the parameters
        self.fp8_skip: tuple[str, ...] | None = None  # which linears are not in fp8; None: all

    @property
    def put(self) -> Callable[[str, Tensor], None] | None:
        """What takes (name in the backbone, values) of a parameter into the shards; None where there are none."""
        shards = self.shards
        return None if shards is None else lambda name, values: shards.put(f"backbone.{name}", values)

    def trained(self) -> dict[str, nn.Parameter]:
        """Return what is trained, by name; of a sharded model this rank's parts, flat."""
        if self.shards is not None:
            return self.shards.trained()
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def slices(self) -> dict[str, Slice]:
        """Return what this rank of a sharded model holds of what is trained, by its names in the backbone."""
        return {name.removeprefix("backbone."): part for name, part in self.shards.slices().items()}

    def masters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name in the backbone, whole tensor) of what is trained.  Every rank of a sharded model must."""
        own = self.trained()
        for name, tensor in own.items() if self.shards is None else self.shards.whole(own):
            yield name.removeprefix("backbone."), tensor.detach()

    def forward(self, batch: MicroBatch, dropout: tuple[int, int] | None = None, normalize: bool = True) -> Tensor:
        """Embed a micro-batch.

        dropout: (seed, step) draws the adapters' dropout for the batch's rows, which then share no prefix; None drops
        nothing.
        Returns (N, D) fp32 (fp64 for a float64 backbone), unit rows unless `normalize` is false.
        Raises ValueError for a shared prefix where its tokens count in every text's mean.
        """
        if batch.n_shared and self.pooling != "last":
            raise ValueError(f"texts cannot share a prefix of {batch.n_shared} tokens under {self.pooling} pooling")
        keys, bounds = self.token_keys, batch.cu_seqlens
        if dropout is None:
            keys.clear()
        else:
            n_tokens = batch.tokens.shape[0]
            rows = batch.rows.repeat_interleave(bounds.diff(), output_size=n_tokens)
            keys.set(*dropout, rows, positions_of(bounds, n_tokens))
        on_last = (lambda: keys.keep_last(bounds)) if self.pooling == "last" else None
        hidden = self.backbone(batch.tokens, bounds, batch.n_shared, on_last)
        hidden = self.backbone.norm(hidden[1:] if batch.n_shared else hidden)  # a shared prefix is no text
        hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        pooled = hidden if self.pooling == "last" else mean_tokens(hidden, bounds, self.pooling == "weighted_mean")
        return F.normalize(pooled, dim=-1) if normalize else pooled


def mean_tokens(hidden: Tensor, cu_seqlens: Tensor, weighted: bool) -> Tensor:
    """Average the tokens of every packed sequence, each alike or by the weights 1, 2, ..., n (arXiv 2202.08904).

    hidden: (T, D).  cu_seqlens: (N+1,) int32.  Returns (N, D), hidden's dtype; each sum has one fixed order.
    """
    lengths = cu_seqlens.diff().to(hidden.dtype)  # (N,)
    share = 1 / lengths if not weighted else 2 / (lengths * (lengths + 1))
    weights = share.repeat_interleave(cu_seqlens.diff(), output_size=hidden.shape[0])  # (T,)
    if weighted:
        weights = weights * (positions_of(cu_seqlens, hidden.shape[0]) + 1)
    # unsafe: the lengths are not read back to be checked, which would stall a GPU's stream
    return torch.segment_reduce(hidden * weights[:, None], "sum", lengths=cu_seqlens.diff().long(), axis=0, unsafe=True)


def unit_prefix(vectors: Tensor, n: int) -> Tensor:
    """Cut unit rows to their first n numbers and make them unit length again (arXiv 2205.13147).

    vectors: (N, D), unit rows.  Returns (N, n), for n = D the vectors as they are.
    """
    return vectors if n == vectors.shape[1] else F.normalize(vectors[:, :n], dim=-1)


def build_model(
    path: Path,
    dtype: torch.dtype,
    device: torch.device,
    *,
    causal: bool,
    lora: LoraConfig | None,
    seed: int,
    full: bool = False,
    pooling: Pooling = "last",
    recompute: Policy = "none",
    strategy: Strategy = "none",
    world: World = ALONE,
    context: LongContext = AS_TRAINED,
    tensors: Iterable[tuple[str, Tensor]] | None = None,
    fp8_skip: Sequence[str] | None = None,
) -> EmbeddingModel:
    """Load a backbone from its files and put fresh adapters on it (none for lora=None).

    full: all weights are to be trained, without adapters.
    strategy: how it is sharded over the ranks of `world`, which must all call this.  context: changes its positions.
    tensors: (our name, values) in place of the files', which then need say no more than the sizes.
    fp8_skip: holds frozen linears in fp8 (fp8.py), but these; None: in dtype, all of them.
    Raises what weights.read_config, rope_scaling.lengthened, fp8.py, weights.load_weights and sharding.shard raise.
    """
    if fp8_skip is not None:
        check_fp8(device, dtype)
    config = lengthened(read_config(path, causal=causal), context)
    with torch.device("meta"):
        model = EmbeddingModel(config, lora, recompute, pooling, full)
    give_dtypes(model.backbone, dtype)
    if fp8_skip is not None:
        apply_fp8(model.backbone, fp8_skip)
        model.fp8_skip = tuple(fp8_skip)
        log(f"frozen linears in row-wise fp8{', but for ' if fp8_skip else ''}{', '.join(fp8_skip)}")
    make_room(model.backbone, dtype, device)
    chosen, why = settle_strategy(strategy, model, world)
    if world.world_size > 1 or chosen != "none":
        log(f"sharding {chosen} ({why})")
    model.shards = shard(model, model.backbone.layers, chosen, replace(world, device=device), each_pass=full)
    load_weights(model.backbone, path, dtype, device, model.put, tensors)
    init_lora(model.backbone, seed, torch.promote_types(dtype, torch.float32), device, model.put)
    return model


def choose_dtype(setting: Dtype, device: torch.device) -> tuple[torch.dtype, str]:
    """Resolve "auto".  Returns the dtype and a sentence that says why."""
    if setting != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[setting], "as configured"
    if device.type == "cuda":
        return torch.bfloat16, "auto: CUDA"
    seconds = {dtype: _gemm_seconds(dtype) for dtype in (torch.float32, torch.bfloat16)}
    best = min(seconds, key=lambda dtype: seconds[dtype])
    timed = ", ".join(f"{str(dtype).removeprefix('torch.')} {s * 1e3:.1f} ms" for dtype, s in seconds.items())
    return best, f"auto: a (256, 576) x (576, 1536) product takes {timed}"


def settle_dtype(setting: Dtype, world: World) -> tuple[torch.dtype, str]:
    """Resolve "auto" for all ranks as rank 0 does.  Returns what `choose_dtype` returns."""
    chosen, why = choose_dtype(setting, world.device) if world.is_main else (None, "")
    name, why = share((str(chosen).removeprefix("torch."), why), world)[0]
    return choose_dtype(name, world.device)[0], why


def _gemm_seconds(dtype: torch.dtype) -> float:
    a, b = torch.ones(256, 576, dtype=dtype), torch.ones(576, 1536, dtype=dtype)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return best
