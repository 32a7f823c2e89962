"""Models of random weights for the benches: sizes, the linears that they are made of, and a model without any file."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from e5core.backbone import BackboneConfig
from e5core.encoder import BackboneSource, EmbeddingModel
from e5core.lora import LoraConfig, init_lora
from e5core.model_files import shapes_of
from e5core.recompute import Policy
from e5core.weights import give_dtypes

MISTRAL = BackboneConfig(
    family="mistral", dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, head_dim=128, hidden_dim=14336,
    vocab_size=32000, norm_eps=1e-5, rope_theta=1e4, window=4096, max_positions=32768,
)  # fmt: skip
SIZES = {
    "7b": MISTRAL,  # mistralai/Mistral-7B-v0.1, config.json
    "135m": replace(
        MISTRAL, dim=576, n_layers=30, n_heads=9, n_kv_heads=3, head_dim=64, hidden_dim=1536, vocab_size=49152,
        rope_theta=1e5, window=None, max_positions=8192,
    ),  # SmolLM2-135M's numbers in Mistral's layout
    "tiny": replace(
        MISTRAL, dim=64, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=16, hidden_dim=160, vocab_size=512, window=None,
        max_positions=1024,
    ),
}  # fmt: skip


def default_size(device: torch.device) -> str:
    """Name the size that a bench takes where none is asked for: the paper's on a GPU, the quickstart's on a CPU."""
    return "7b" if device.type == "cuda" else "135m"


def linears(config: BackboneConfig) -> dict[str, tuple[int, int]]:
    """Return (in, out) of the seven linears of a block."""
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    attention = {"wq": (config.dim, q), "wk": (config.dim, kv), "wv": (config.dim, kv), "wo": (q, config.dim)}
    wide = (config.dim, config.hidden_dim)
    return attention | {"w_gate": wide, "w_up": wide, "w_down": wide[::-1]}


def random_tensors(
    config: BackboneConfig, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> Iterator[tuple[str, Tensor]]:
    """Yield (our name, values) of every weight, one at a time: N(0, 0.02), norms of 1, drawn on the device."""
    generator = torch.Generator(device).manual_seed(seed)
    for name, shape in shapes_of(config).items():
        values = torch.empty(shape, dtype=dtype, device=device)
        yield name, values.fill_(1) if "norm" in name else values.normal_(0, 0.02, generator=generator)


def random_model(
    config: BackboneConfig,
    source: BackboneSource,
    lora: LoraConfig,
    dtype: torch.dtype,
    device: torch.device,
    recompute: Policy = "none",
) -> EmbeddingModel:
    """Build what encoder.build_model would, on one device, from random weights instead of files.

    source: its path is not looked at.
    """
    with torch.device("meta"):
        model = EmbeddingModel(replace(config, causal=source.causal), lora, recompute, source.pooling)
    backbone = model.backbone
    give_dtypes(backbone, dtype)
    held = dict(backbone.named_parameters())
    for name, values in random_tensors(config, dtype, device):
        owner, _, leaf = name.rpartition(".")
        loaded = torch.nn.Parameter(values.to(held[name].dtype), requires_grad=False)
        backbone.get_submodule(owner).register_parameter(leaf, loaded)
    init_lora(backbone, 0, torch.promote_types(dtype, torch.float32), device)
    return model
