"""AdamW (arXiv 1711.05101) with warm-up, linear decay and clipping by the global norm, on fp32 master parameters."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import nn

from e5core.distributed import ALONE, World, share, sum_over_ranks
from e5core.sharding import Slice

GROUP_BYTES = 64 * 2**20  # of parameters that are updated at once
_MOMENTS = tuple(enumerate(("first", "second")))


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """The [optim] table; defaults from the paper's appendix A, betas and eps torch's."""

    lr: Annotated[float, Field(gt=0)] = 1e-4
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    clip: Annotated[float, Field(gt=0)] = 1.0  # global gradient norm
    warmup_steps: Annotated[int, Field(ge=0)] = 100
    warmup_share: Annotated[float, Field(ge=0, le=1)] | None = None  # of all steps; takes the place of warmup_steps
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    eps: Annotated[float, Field(gt=0)] = 1e-8

    def warmup(self, total_steps: int) -> int:
        """Return the number of warm-up steps in a run of `total_steps`."""
        return self.warmup_steps if self.warmup_share is None else math.ceil(self.warmup_share * total_steps)


def learning_rate(config: OptimConfig, step: int, total_steps: int) -> float:
    """Return the rate of step `step` (from 0): rising to lr over the warm-up, then falling linearly, never 0."""
    warmup = config.warmup(total_steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    return config.lr * (total_steps - step) / max(1, total_steps - warmup)


class AdamW:
    """The optimizer's state and update, parameter by parameter, in the order of operations of torch.optim.AdamW."""

    def __init__(
        self, parameters: Mapping[str, nn.Parameter | Slice], config: OptimConfig, world: World = ALONE
    ) -> None:
        """parameters: a Slice for one that the ranks of `world` hold in stretches, of which each updates its own."""
        self.parameters = {name: p.values if isinstance(p, Slice) else p for name, p in parameters.items()}
        self._places = {name: (p.start, p.shape) for name, p in parameters.items() if isinstance(p, Slice)}
        self.config = config
        self._world = world
        self.n_updates = 0
        self.moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in self.parameters.items()}
        self._groups = list(_grouped(self.parameters))

    def clip_gradients(self) -> float:
        """Scale the gradients so that their global norm is at most `clip`.  Returns the norm before.

        Raises FloatingPointError naming the tensors whose gradient is not finite, RuntimeError where one is missing.
        """
        gradients = {name: p.grad for name, p in self.parameters.items()}
        absent = [name for name, g in gradients.items() if g is None]
        if absent:
            raise RuntimeError(f"no gradient reached {len(absent)} trainable tensors, first of them {absent[0]}")
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(gradients.values()))))
        norm = sum_over_ranks(norm.square(), self._world).sqrt().item() if self._places else norm.item()
        if not math.isfinite(norm):
            raise FloatingPointError(self._broken(gradients))
        if norm > self.config.clip:
            torch._foreach_mul_(list(gradients.values()), self.config.clip / norm)
        return norm

    def _broken(self, gradients: Mapping[str, torch.Tensor]) -> str:
        """Say what is wrong with the gradients of all ranks, whose norm is not finite."""
        largest = {name: g.abs().max().item() for name, g in gradients.items() if g.numel()}
        found = [item for own in share(list(largest.items()), self._world) for item in own]
        broken = list(dict.fromkeys(name for name, value in found if not math.isfinite(value)))
        if broken:
            return f"the gradient is not finite in {len(broken)} tensors, first of them {broken[0]}"
        name, value = max(found, key=lambda item: item[1])
        return f"the gradient's norm is beyond fp32: its largest number is {value:.3g}, in {name}"

    @torch.no_grad()
    def update(self, lr: float) -> None:
        """Apply one step with the gradients in hand and drop them."""
        self.n_updates += 1
        for names in self._groups:
            self._update(names, lr)
        for parameter in self.parameters.values():
            parameter.grad = None

    def _update(self, names: Sequence[str], lr: float) -> None:
        c = self.config
        correction1, correction2 = 1 - c.beta1**self.n_updates, 1 - c.beta2**self.n_updates
        parameters = [self.parameters[name] for name in names]
        gradients = [parameter.grad for parameter in parameters]
        first, second = (list(moments) for moments in zip(*(self.moments[name] for name in names), strict=True))
        torch._foreach_mul_(parameters, 1 - lr * c.weight_decay)
        torch._foreach_lerp_(first, gradients, 1 - c.beta1)
        torch._foreach_mul_(second, c.beta2)
        torch._foreach_addcmul_(second, gradients, gradients, 1 - c.beta2)
        denominators = torch._foreach_sqrt(second)
        torch._foreach_div_(denominators, math.sqrt(correction2))
        torch._foreach_add_(denominators, c.eps)
        torch._foreach_addcdiv_(parameters, first, denominators, -lr / correction1)

    def state(self) -> dict[str, Slice]:
        """Return by name the moments that this rank holds, as views: who writes into them puts a state back."""
        pairs = ((f"{name}.{which}", name, pair[i]) for name, pair in self.moments.items() for i, which in _MOMENTS)
        return {key: Slice(m.view(-1), *self._places.get(name, (0, tuple(m.shape)))) for key, name, m in pairs}


def _grouped(parameters: Mapping[str, torch.Tensor]) -> Iterator[list[str]]:
    """Yield names of parameters to update at once: few launches on a GPU, and a denominator of bounded size."""
    names, n_bytes = [], 0
    for name, parameter in parameters.items():
        if names and n_bytes + parameter.nbytes > GROUP_BYTES:
            yield names
            names, n_bytes = [], 0
        names.append(name)
        n_bytes += parameter.nbytes
    if names:
        yield names
