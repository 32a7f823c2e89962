"""Scaled rotary positions are transformers', on its models, and reach as far as they say."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import VARIANTS, save_embedder, save_peer
from test_backbone import packed, relative
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from e5core.backbone import Backbone, BackboneConfig, rotary_of, stretched_theta
from e5core.encode import Encoder, main
from e5core.rope_scaling import LongContext, lengthened
from e5core.weights import load_weights, read_config

TRAINED = 16  # of the tiny models here, so that the texts of `packed` are longer and shorter
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": TRAINED}
CASES = {  # ours, and transformers' table
    "linear": ("linear:4", {"rope_type": "linear", "factor": 4.0}),
    "yarn": (f"yarn:4:{TRAINED}", YARN),
    "dynamic": (f"dynamic:4:{TRAINED}", {"rope_type": "dynamic", "factor": 4.0}),
}


def sized(head_dim: int, theta: float, trained: int) -> BackboneConfig:
    sizes = {"dim": 64, "n_layers": 1, "n_heads": 1, "n_kv_heads": 1, "hidden_dim": 8, "vocab_size": 9}
    return BackboneConfig(
        family="llama", **sizes, head_dim=head_dim, norm_eps=1e-5, rope_theta=theta, max_positions=trained
    )


def angles(config: BackboneConfig, n_tokens: int) -> tuple[Tensor, float]:
    """The frequencies of one text of n_tokens, and what cosines are multiplied by, in float64."""
    theta = config.rope_theta
    if config.rope_dynamic is not None:
        theta = stretched_theta(torch.tensor([0, n_tokens]), n_tokens, config, torch.float64)
    second = torch.arange(n_tokens) * 0 + 1  # the angles of position 1 are the frequencies
    rotary = rotary_of(second, theta, config.rope_divisors, config.head_dim, torch.float64)
    return torch.atan2(rotary.sin, rotary.cos)[-1, 0], config.rope_magnitude


@pytest.mark.parametrize(("head_dim", "theta", "trained"), [(64, 1e4, 2048), (128, 1e6, 32768), (24, 500.0, 100)])
@pytest.mark.parametrize("factor", [1.5, 8.0])
@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn", "ntk"])
def test_frequencies_equal_transformers(kind: str, factor: float, head_dim: int, theta: float, trained: int) -> None:
    length = 3 * trained
    config = lengthened(sized(head_dim, theta, trained), LongContext(rope_scaling=f"{kind}:{factor}"))
    # transformers has no fixed NTK-aware scaling: its dynamic one of factor 1 is that, for a text of factor * trained
    theirs = {"rope_type": "dynamic" if kind == "ntk" else kind, "factor": 1.0 if kind == "ntk" else factor}
    peer = LlamaConfig(
        hidden_size=head_dim,
        num_attention_heads=1,
        max_position_embeddings=trained,
        rope_parameters=theirs | {"rope_theta": theta, "original_max_position_embeddings": trained},
    )
    seq_len = int(factor * trained) if kind == "ntk" else length
    expected, magnitude = ROPE_INIT_FUNCTIONS[theirs["rope_type"]](peer, torch.device("cpu"), seq_len=seq_len)
    got, ours = angles(config, length)
    assert (got.float() / expected - 1).abs().max() < 2e-6
    assert ours == pytest.approx(magnitude, rel=1e-12)
    assert config.max_positions == int(factor * trained)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("variant", ["llama2", "mistral-window"])
def test_hidden_states_of_a_scaled_model_equal_transformers(case: str, variant: str, tmp_path: Path) -> None:
    peer, (texts, tokens, cu_seqlens) = save_peer(variant, tmp_path), packed()
    scaling, table = CASES[case]
    config_class, model_class, changes = VARIANTS[variant]
    config = config_class(**{**peer.config.to_dict(), **changes, "rope_parameters": table | {"rope_theta": 1e4}})
    config.max_position_embeddings = TRAINED
    scaled = lengthened(read_config(tmp_path), LongContext(rope_scaling=scaling))
    with torch.device("meta"):
        backbone = Backbone(scaled)
    load_weights(backbone, tmp_path, torch.float32, torch.device("cpu"))
    expected = []
    with torch.no_grad():
        for text in texts:
            other = model_class(config).eval()  # anew: of dynamic scaling it keeps the longest length that it has seen
            other.load_state_dict(peer.state_dict())
            expected.append(other(text[None]).last_hidden_state[0])
        plain = torch.cat([peer(text[None]).last_hidden_state[0] for text in texts])
        got = backbone.norm(backbone(tokens, cu_seqlens))
    assert (got - torch.cat(expected)).abs().max() < 2e-5
    assert relative(got, plain) > 0.01


def test_dynamic_scaling_leaves_texts_of_the_trained_length_as_they_are() -> None:
    plain = sized(24, 1e4, 100)
    config = lengthened(plain, LongContext(rope_scaling="dynamic:8"))
    assert torch.equal(angles(config, 100)[0], angles(plain, 100)[0])
    assert not torch.equal(angles(config, 101)[0], angles(plain, 101)[0])


def test_scaling_changes_global_layers_alone_where_local_ones_have_their_own_base(tmp_path: Path) -> None:
    save_peer("gemma3", tmp_path)
    plain = read_config(tmp_path)
    config = lengthened(plain, LongContext(rope_scaling="yarn:4", rope_theta=1e5))
    with torch.device("meta"):
        backbone = Backbone(config)
    backbone = backbone.to_empty(device="cpu")
    load_weights(backbone, tmp_path, torch.float32, torch.device("cpu"))
    seen = []
    for layer in backbone.layers:
        layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
    _, tokens, cu_seqlens = packed()
    backbone(tokens, cu_seqlens)
    positions = torch.cat([torch.arange(n) for n in cu_seqlens.diff().tolist()])
    local = rotary_of(positions, plain.local_rope_theta, None, plain.head_dim, torch.float32)
    assert torch.equal(seen[0].cos, local.cos) and torch.equal(seen[2].cos, local.cos)
    whole = rotary_of(positions, 1e5, config.rope_divisors, plain.head_dim, torch.float32)
    assert torch.equal(seen[1].cos, (0.1 * math.log(4) + 1) * whole.cos)
    with pytest.raises(ValueError, match="a rotary base of their own cannot be changed"):
        lengthened(plain, LongContext(window=0))


def test_the_window_and_the_base_are_replaced(tmp_path: Path) -> None:
    save_peer("mistral-window", tmp_path)
    config = read_config(tmp_path)
    assert lengthened(config, LongContext()) == config
    assert lengthened(config, LongContext(window=0, rope_theta=1e5)) == replace(config, window=None, rope_theta=1e5)
    assert lengthened(config, LongContext(window=9)).window_of(0) == 9
    assert lengthened(config, LongContext(rope_scaling="ntk:2:64")).max_positions == config.max_positions == 256


WRONG = [
    *({"rope_scaling": text} for text in ("", "yarn", "yarn:", "yarn:x", "yarn:1", "yarn:nan", "yarn:inf", "yarn:2:0")),
    *({"rope_scaling": text} for text in ("ntk:2:8:9", "longrope:2", "linear:-2", "linear:2:1.5")),
    {"rope_theta": 1.0},
    {"rope_theta": float("nan")},
    {"window": -1},
]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_a_malformed_setting_is_refused_by_name(wrong: dict) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong)).replace('_', ' ')} must be "):
        lengthened(sized(24, 1e4, 100), LongContext(**wrong))


def test_a_model_that_is_scaled_already_is_refused(tmp_path: Path) -> None:
    save_peer("llama3", tmp_path)
    config = read_config(tmp_path)
    for context in (LongContext(rope_scaling="yarn:4"), LongContext(rope_theta=1e6)):
        with pytest.raises(ValueError, match="scales its rotary frequencies already"):
            lengthened(config, context)


def test_encoding_goes_beyond_the_model_s_length_only_with_scaling(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model, text = save_embedder(tmp_path / "model"), "tram " * 300
    with pytest.raises(ValueError, match="at most 512"):
        Encoder.load(str(model), max_tokens=2000, dtype="float32")
    context = LongContext(rope_scaling="dynamic:4")
    encoder = Encoder.load(str(model), max_tokens=2000, dtype="float32", context=context)
    vectors = encoder.encode([text, "a", "ab"], task="Find it, whatever it is.")
    assert encoder.n_truncated == 0
    plain = Encoder.load(str(model), dtype="float32")
    # neither a long neighbour nor a shared instruction changes a text
    assert abs(vectors[1:] - plain.encode(["a", "ab"], task="Find it, whatever it is.")).max() < 1e-6
    source, output = tmp_path / "texts.jsonl", tmp_path / "v.npy"
    source.write_text('{"text": "a"}\n')
    arguments = [str(model), "--input", str(source), "--output", str(output), "--dtype", "float32"]
    assert main([*arguments, "--max-tokens", "2000", "--rope-scaling", "yarn:4", "--window", "64"]) == 0
    assert main([*arguments, "--rope-scaling", "yarn"]) == 2
    assert "rope scaling must be KIND:FACTOR" in capfd.readouterr().err
