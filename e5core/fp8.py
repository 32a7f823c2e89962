"""Frozen linears in row-wise fp8: which of a backbone's, on which devices, and what quantises their inputs.

    backbone.frozen_dtype = "fp8"      y = (q W_q^T) s_x s_w + b,  dx = (g_q V_q^T) s_g s_v    (e5kernels/fp8_linear.py)
    backbone.fp8_skip = ["w_down"]     these stay in the backbone's dtype, in every layer; or, in one of them,
                                       "layers.1.feed_forward.w_down"; or a whole layer, "layers.0"; by default
                                       attention's four

The weights are quantised one by one as they come from the file, and never stand beside a whole copy in another dtype.
The adapters and all that is between the linears stay as they are without fp8. Before the linears stand norms and the
gated activation, which quantise what they write, once for all the linears that read it; wo quantises its own input.
"""

from collections.abc import Sequence

import torch
from torch import nn

from e5core.backbone import FP8_LEAVES, Backbone, Block
from e5core.lora import LINEARS, READERS, owner_of
from e5kernels.fp8 import E4M3
from e5kernels.fp8_linear import MULTIPLE

ATTENTION = READERS[0] + READERS[1]  # a fifth of a Mistral's products; docs/results.md has what they cost in fp8
CAPABILITY = (8, 9)  # of the first GPUs that multiply e4m3


def check_fp8(device: torch.device, dtype: torch.dtype) -> None:
    """Refuse a device, or a dtype of activations on it, that fp8 products do not know.  Raises ValueError."""
    if device.type != "cuda":
        return
    found = torch.cuda.get_device_capability(device)
    if found < CAPABILITY:
        raise ValueError(
            f'backbone.frozen_dtype = "fp8" needs a GPU of compute capability 8.9 or more (RTX 4090, L40S, H100): got '
            f"{torch.cuda.get_device_name(device)} with {found[0]}.{found[1]}; train with backbone.frozen_dtype=same, "
            "encode with --dtype bfloat16"
        )
    if dtype != torch.bfloat16:
        raise ValueError(
            f'backbone.frozen_dtype = "fp8" needs bfloat16 activations on a GPU: got {dtype}; set '
            "backbone.dtype=bfloat16, or backbone.frozen_dtype=same"
        )


def apply_fp8(backbone: Backbone, skip: Sequence[str]) -> None:
    """Hold the linears of every layer in fp8, but those that skip names; load_weights fills them.

    Raises ValueError for a name that is none, for a linear whose sizes fp8 products do not take, and if none is left.
    """
    unknown, n_held = set(skip), 0
    for i, layer in enumerate(backbone.layers):
        held = set()
        for name in LINEARS:
            path = f"layers.{i}.{'attention' if owner_of(layer, name) is layer.attention else 'feed_forward'}.{name}"
            if found := {name, path, f"layers.{i}"}.intersection(skip):
                unknown -= found
                continue
            _hold(owner_of(layer, name).get_submodule(name), path)
            held.add(name)
        _quantise_inputs(layer, held)
        n_held += len(held)
    if unknown:
        raise ValueError(
            f"backbone.fp8_skip names no linear: got {sorted(unknown)}, allowed are {', '.join(LINEARS)} and, in one "
            'layer, names like "layers.1.feed_forward.w_down" or "layers.1"'
        )
    if not n_held:
        raise ValueError("backbone.fp8_skip leaves no linear to fp8; set backbone.frozen_dtype=same instead")


def _hold(linear: nn.Module, path: str) -> None:
    n_out, n_in = linear.weight.shape
    if n_out % MULTIPLE or n_in % MULTIPLE:
        raise ValueError(
            f"{path} is {n_out} x {n_in}, and fp8 products take multiples of {MULTIPLE}; name it in backbone.fp8_skip"
        )
    parts = {"weight": ((n_out, n_in), E4M3), "weight_scale": ((n_out, 1), torch.float32)}
    parts |= {"weight_t": ((n_in, n_out), E4M3), "weight_t_scale": ((n_in, 1), torch.float32)}
    for leaf, (shape, dtype) in parts.items():
        empty = torch.empty(shape, dtype=dtype, device=linear.weight.device)
        linear.register_parameter(leaf, nn.Parameter(empty, requires_grad=False))
    assert parts.keys() == {"weight", *FP8_LEAVES}


def _quantise_inputs(layer: Block, held: set[str]) -> None:
    layer.attention_norm.quantises = not held.isdisjoint(("wq", "wk", "wv"))
    layer.ffn_norm.quantises = not held.isdisjoint(("w_gate", "w_up"))
    layer.feed_forward.quantises = "w_down" in held
