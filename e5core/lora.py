"""Low-rank adapters by hand (arXiv 2106.09685): y = x W^T + b + s z B^T,  z = d(x) A^T,  s = alpha / rank.

W and b, where there is one, are frozen; A (R, in) and B (out, R) are fp32 masters cast to x's dtype where they are
used. d is dropout on the adapter's input, as in PEFT: d(x) = m * x / (1 - p). The backward pass, and what is saved for
it, stands in e5kernels/lora_linear.py. The mask m is a pure function of (seed, step, layer,
linear, row in the global batch, position, channel): any packing, micro-batch or number of ranks draws the same, and so
does the backward pass (e5kernels/dropout.py; p is rounded to a multiple of 1/256).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from e5core.backbone import FP8_LEAVES, Backbone, Block, FrozenLinear, fp8_weight, plain
from e5kernels.adapted import Adapted, Drop
from e5kernels.dropout import mix, mix_tensor
from e5kernels.fp8 import Rows
from e5kernels.fp8_linear import fp8_lora_linear
from e5kernels.lora_linear import lora_linear, room_of, with_room

LINEARS = ("wq", "wk", "wv", "wo", "w_gate", "w_up", "w_down")
READERS = (("wq", "wk", "wv"), ("wo",), ("w_gate", "w_up"), ("w_down",))  # of one x each, in a block's order


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraConfig:
    """The [lora] table; defaults from intfloat/e5-mistral-7b-instruct, lora/adapter_config.json."""

    rank: Annotated[int, Field(ge=1, le=1024)] = 16
    alpha: Annotated[float, Field(gt=0)] = 32.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1  # rounded to a multiple of 1/256
    targets: tuple[str, ...] = LINEARS
    init: str | None = None  # run or adapter folder (PEFT's layout) to start from; None: A random, B zero

    def __post_init__(self) -> None:
        unknown = [name for name in self.targets if name not in LINEARS]
        if unknown or not self.targets:
            raise ValueError(f"targets match no linear: got {list(self.targets)}, allowed are {', '.join(LINEARS)}")
        if len(set(self.targets)) != len(self.targets):
            raise ValueError(f"targets name a linear twice: got {list(self.targets)}")


class TokenKeys:
    """The dropout keys of the micro-batch in hand, shared by all adapters of a model.

    `keys` is (T,) int64 in training and None where nothing is dropped; `step_key` mixes seed and step.
    """

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.step_key = 0

    def set(self, seed: int, step: int, rows: Tensor, positions: Tensor) -> None:
        """Key every token by its row in the global batch and its position.  rows, positions: (T,) int64."""
        self.step_key = mix(mix(seed) + step)
        self.keys = mix_tensor((rows << 32) + positions)

    def clear(self) -> None:
        """Drop nothing until the next `set`."""
        self.keys = None

    def keep_last(self, cu_seqlens: Tensor) -> None:
        """Keep the keys of every sequence's last token alone, the only ones that are computed from here on."""
        if self.keys is not None:
            self.keys = self.keys.index_select(0, cu_seqlens[1:].long() - 1)

    @contextmanager
    def replaced(self, keys: Tensor | None, step_key: int) -> Iterator[None]:
        """Draw by these keys, an earlier forward pass's, for the length of a with block."""
        current = self.keys, self.step_key
        self.keys, self.step_key = keys, step_key
        try:
            yield
        finally:
            self.keys, self.step_key = current


class LoraLinear(nn.Module):
    """A frozen linear and its adapter.

    weight: (out, in).  bias: (out,) or None; with FP8_LEAVES as FrozenLinear's.  lora_a: (R, in), lora_b: (out, R),
    fp32 or fp64.
    """

    def __init__(self, linear: FrozenLinear, config: LoraConfig, number: int, token_keys: TokenKeys) -> None:
        super().__init__()
        self.weight = linear.weight
        self.register_parameter("bias", linear.bias)
        for leaf in FP8_LEAVES:  # fp8.py fills them, after the adapters are there
            self.register_parameter(leaf, None)
        self.scale = config.alpha / config.rank
        self.drop_below = round(config.dropout * 256)
        self.number = number  # of the linear in the model: 7 * layer + its place in LINEARS
        self.token_keys = token_keys
        n_out, n_in = linear.weight.shape
        self.lora_a = nn.Parameter(torch.empty(config.rank, n_in))
        self.lora_b = nn.Parameter(torch.empty(n_out, config.rank))

    def forward(self, x: Tensor | Rows, is_read: bool = True, y: Tensor | None = None) -> Tensor:
        """Return y (T, out); where it is not read, zeros in its place, through which all gradients flow as ever.

        y: the same, where it has been computed together with others': so a hook sees it, but cannot change x.
        """
        return _outputs(x, [self], is_read)[0] if y is None else y

    @staticmethod
    def together(x: Tensor | Rows, linears: Sequence["LoraLinear"]) -> Sequence[Tensor]:
        """Return what linears, all in fp8 or none, make of one x, in one pass over it."""
        return [linear(x, y=y) for linear, y in zip(linears, _outputs(x, linears), strict=True)]

    @property
    def is_fp8(self) -> bool:
        """Whether the frozen weight is held in fp8."""
        return self.weight_scale is not None

    def adapted(self) -> Adapted:
        """Return what the op takes."""
        weight = fp8_weight(self) if self.is_fp8 else self.weight
        stream = mix(self.token_keys.step_key + self.number)
        return Adapted(weight, self.bias, self.lora_a, self.lora_b, stream)


def _outputs(x: Tensor | Rows, linears: Sequence[LoraLinear], is_read: bool = True) -> Sequence[Tensor]:
    first, adapted = linears[0], [linear.adapted() for linear in linears]
    drop = Drop(first.token_keys.keys, first.drop_below) if first.drop_below else Drop()
    if first.is_fp8:
        return fp8_lora_linear(x, adapted, first.scale, drop, is_read)
    return lora_linear(plain(x), adapted, first.scale, drop, is_read)


def owner_of(layer: Block, name: str) -> nn.Module:
    """Return the half of a layer that holds a linear, one of LINEARS."""
    return layer.attention if name in ("wq", "wk", "wv", "wo") else layer.feed_forward


def apply_lora(backbone: Backbone, config: LoraConfig) -> TokenKeys:
    """Replace the target linears of every layer by adapted ones (weights as they are, adapters uninitialised).

    Returns the token keys that all adapters read.
    """
    token_keys = TokenKeys()
    for i, layer in enumerate(backbone.layers):
        for name in config.targets:
            owner, number = owner_of(layer, name), len(LINEARS) * i + LINEARS.index(name)
            owner.add_module(name, LoraLinear(owner.get_submodule(name), config, number, token_keys))
    return token_keys


def make_room(backbone: Backbone, dtype: torch.dtype, device: torch.device) -> None:
    """Lay out a model that is on the meta device yet for one product of linear and adapter, [x | s z] by [W | B].

    Where the device's face of lora_linear does that, and all who read an x are adapted, x comes with spare columns from
    the op that makes it, and their weights lie transposed with room for B behind them. Elsewhere nothing is changed.
    dtype, device: of the weights to come.
    """
    for _, maker, linears in adapted_readers(backbone):
        maker.spare = room_of(len(linears[0].lora_a), dtype, device)
        for linear in linears if maker.spare else ():
            linear.weight = nn.Parameter(with_room(linear.weight.detach(), maker.spare), requires_grad=False)


def adapted_readers(backbone: Backbone) -> Iterator[tuple[int, nn.Module, list[LoraLinear]]]:
    """Yield, block by block, the groups of READERS that are adapted as a whole and not in fp8, which room suits.

    Each with its place in READERS, the module that makes what it reads, and its linears.
    """
    for layer in backbone.layers:
        makers = (layer.attention_norm, layer.attention, layer.ffn_norm, layer.feed_forward)
        for place, (maker, readers) in enumerate(zip(makers, READERS, strict=True)):
            linears = [owner_of(layer, name).get_submodule(name) for name in readers]
            if all(isinstance(linear, LoraLinear) and not linear.is_fp8 for linear in linears):
                yield place, maker, linears


def init_lora(
    backbone: Backbone,
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
    put: Callable[[str, Tensor], None] | None = None,
) -> None:
    """Set A to U(-1, 1) / sqrt(in) (PEFT's kaiming with a = sqrt 5), each by its own seeded generator, and B to 0.

    put: takes (name, tensor) of each A instead, and B is 0 already.
    """
    for name, linear in adapters(backbone):
        bound = 1 / math.sqrt(linear.lora_a.shape[1])
        generator = torch.Generator().manual_seed(mix(mix(seed) ^ linear.number) >> 1)
        values = torch.empty(linear.lora_a.shape, dtype=dtype).uniform_(-bound, bound, generator=generator)
        if put is not None:
            put(f"{name}.lora_a", values)
            continue
        linear.lora_a = nn.Parameter(values.to(device))
        linear.lora_b = nn.Parameter(torch.zeros(linear.lora_b.shape, dtype=dtype, device=device))


def adapters(backbone: Backbone) -> Iterator[tuple[str, LoraLinear]]:
    """Yield (name, module) of every adapted linear, e.g. "layers.0.attention.wq"."""
    for name, module in backbone.named_modules():
        if isinstance(module, LoraLinear):
            yield name, module
