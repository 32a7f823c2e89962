"""Models of random weights for the benches: their sizes, one in memory without any file, one as a folder."""

import json
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import tokenizers
import torch
from torch import Tensor

from e5core.backbone import BackboneConfig
from e5core.distributed import ALONE, World
from e5core.encoder import BackboneSource, EmbeddingModel, build_model
from e5core.lora import LoraConfig
from e5core.model_files import shapes_of, write_hf_weights
from e5core.recompute import Policy
from e5core.sharding import Strategy
from e5core.weights import read_config

SPECIAL = ["<unk>", "<s>", "</s>"]
BOS, EOS = 1, 2

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
    config: BackboneConfig, source: BackboneSource, lora: LoraConfig, dtype: torch.dtype, device: torch.device
) -> EmbeddingModel:
    """Build a random Mistral of these sizes without any weight file.  Arguments as `filled_model`'s."""
    with tempfile.TemporaryDirectory() as folder:
        write_config(Path(folder), config, dtype)
        return filled_model(Path(folder), source, lora, dtype, device)


def filled_model(
    path: Path,
    source: BackboneSource,
    lora: LoraConfig | None,
    dtype: torch.dtype,
    device: torch.device,
    recompute: Policy = "none",
    full: bool = False,
    strategy: Strategy = "none",
    world: World = ALONE,
) -> EmbeddingModel:
    """Build a model as a run does, by encoder.build_model, with random weights in place of its files'.

    path: says what the decoder is; config.json is enough.  source: the [backbone] table; its path and dtype are not
    looked at.  The last three are that function's.
    Raises ValueError for a key of the table that is not handed on here: the model would not be what it says.
    """
    form = {"causal": source.causal, "pooling": source.pooling, "fp8_skip": source.skipped}
    unheard = sorted(set(asdict(source)) - {"path", "dtype", "frozen_dtype", *form})
    if unheard:
        raise ValueError(f"bench/models.py does not hand on backbone.{unheard[0]}; make it do so")
    weights = random_tensors(read_config(path), dtype, device)
    held = {"full": full, "strategy": strategy, "world": world}
    return build_model(path, dtype, device, lora=lora, seed=0, recompute=recompute, tensors=weights, **form, **held)


def write_config(folder: Path, config: BackboneConfig, dtype: torch.dtype) -> None:
    """Write the config.json of a random Mistral, as Hugging Face has it."""
    described = {
        "model_type": "mistral", "architectures": ["MistralModel"], "torch_dtype": str(dtype).removeprefix("torch."),
        "hidden_size": config.dim, "num_hidden_layers": config.n_layers, "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads, "head_dim": config.head_dim, "intermediate_size": config.hidden_dim,
        "vocab_size": config.vocab_size, "rms_norm_eps": config.norm_eps, "rope_theta": config.rope_theta,
        "sliding_window": config.window, "max_position_embeddings": config.max_positions, "hidden_act": "silu",
        "tie_word_embeddings": False, "bos_token_id": BOS, "eos_token_id": EOS,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")


def write_tokenizer(folder: Path, texts: Iterable[str], vocab_size: int) -> None:
    """Train a byte-level byte-pair tokenizer on some texts and write it as a Hugging Face folder has it."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(texts, trainer)
    model.save(str(folder / "tokenizer.json"))
    described = {"bos_token": SPECIAL[BOS], "eos_token": SPECIAL[EOS], "add_bos_token": True}
    described |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(described), encoding="utf-8")


def write_model(
    folder: Path, config: BackboneConfig, dtype: torch.dtype, device: torch.device, texts: Iterable[str]
) -> None:
    """Write a random Mistral as a Hugging Face folder: config, sharded safetensors, a tokenizer made of the texts.

    device: draws the weights; one tensor is in memory at a time.
    """
    write_config(folder, config, dtype)
    write_tokenizer(folder, texts, config.vocab_size)
    write_hf_weights(folder, config, ((n, t.cpu()) for n, t in random_tensors(config, dtype, device)), dtype)
