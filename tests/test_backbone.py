"""The backbone is transformers' Llama, Mistral, Qwen and Gemma, computed packed."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import VARIANTS, part_names, peer_model, save_peer
from torch import Tensor

from e5core.backbone import Backbone, Rotary
from e5core.weights import load_weights, read_config
from e5kernels.attention import varlen_attention

LENGTHS = (1, 1, 23, 7, 2, 40)


def load(folder: Path, dtype: torch.dtype = torch.float32, causal: bool = True) -> Backbone:
    with torch.device("meta"):
        backbone = Backbone(read_config(folder, causal=causal))
    load_weights(backbone, folder, dtype, torch.device("cpu"))
    return backbone


def packed(lengths: tuple[int, ...] = LENGTHS) -> tuple[list[Tensor], Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(0, 97, (n,), generator=generator) for n in lengths]
    return texts, torch.cat(texts), torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def relative(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("variant", VARIANTS)
def test_hidden_states_equal_transformers(variant: str, tmp_path: Path) -> None:
    peer, (texts, tokens, cu_seqlens) = save_peer(variant, tmp_path), packed()
    backbone = load(tmp_path)
    with torch.no_grad():
        expected = torch.cat([peer(text[None]).last_hidden_state[0] for text in texts])
        got = backbone.norm(backbone(tokens, cu_seqlens))
    assert (got - expected).abs().max() < 1e-5


@pytest.mark.parametrize(
    "variant", ["mistral-window", "llama3", "qwen2-window", "qwen3-window", "gemma3", "gemma3-linear"]
)
def test_parameter_gradients_equal_transformers(variant: str, tmp_path: Path) -> None:
    peer, (texts, tokens, cu_seqlens) = save_peer(variant, tmp_path), packed()
    backbone = load(tmp_path).requires_grad_(True)
    weight = torch.randn(tokens.shape[0], 48, generator=torch.Generator().manual_seed(2))
    (backbone.norm(backbone(tokens, cu_seqlens)) * weight).sum().backward()
    (torch.cat([peer(text[None]).last_hidden_state[0] for text in texts]) * weight).sum().backward()
    theirs, names = dict(peer.named_parameters()), part_names(peer)
    for name, parameter in backbone.named_parameters():
        part, _, leaf = name.rpartition(".")
        gradient = theirs.pop(f"{names[part]}.{leaf}").grad
        assert relative(parameter.grad, gradient) < 1e-4, name
    assert not theirs


def test_layers_see_what_their_kind_says(tmp_path: Path) -> None:
    windows = {
        "qwen2": [None, None, None],
        "qwen2-window": [None, 5, 5],
        "qwen3-window": [5, None, 5],
        "gemma3": [5, None, 5],
        "gemma3-linear": [5, 5, 5, 5, 5, None, 5],
        "mistral-window": [5, 5, 5],
    }
    for variant, expected in windows.items():
        save_peer(variant, tmp_path / variant)
        config = read_config(tmp_path / variant)
        assert [config.window_of(i) for i in range(config.n_layers)] == expected, variant


@pytest.mark.parametrize("variant, n_bases", [("gemma3-linear", 2), ("qwen2-window", 1)])
def test_layers_of_one_rotary_base_share_their_angles(variant: str, n_bases: int, tmp_path: Path) -> None:
    save_peer(variant, tmp_path)
    backbone, (_, tokens, cu_seqlens) = load(tmp_path), packed()
    seen: list[Rotary] = []
    for layer in backbone.layers:
        layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
    backbone(tokens, cu_seqlens)
    assert len({id(rotary) for rotary in seen}) == n_bases
    assert [torch.equal(seen[0].cos, rotary.cos) for rotary in seen] == [i != 5 for i in range(len(seen))]


def test_bf16_rounds_where_transformers_does(tmp_path: Path) -> None:
    peer = peer_model("gemma3").to(torch.bfloat16)
    peer.save_pretrained(tmp_path)
    backbone, (_, tokens, cu_seqlens) = load(tmp_path, torch.bfloat16), packed()
    for norm, theirs in (
        (backbone.norm, peer.norm),
        (backbone.layers[1].ffn_norm, peer.layers[1].pre_feedforward_layernorm),
    ):
        assert torch.equal(norm.weight, 1 + theirs.weight.float())
        assert not torch.equal(norm.weight, norm.weight.bfloat16().float())  # in bf16 it would be another
    seen: list[Tensor] = []
    backbone.layers[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        assert backbone(tokens, cu_seqlens).dtype == torch.bfloat16
        expected = peer.embed_tokens(tokens)
    assert torch.equal(seen[0], expected)
    assert not torch.equal(seen[0], (peer.embed_tokens.weight[tokens].float() * 48**0.5).bfloat16())


def test_packed_equals_one_by_one_in_float64(tmp_path: Path) -> None:
    save_peer("mistral-window", tmp_path)
    backbone, (texts, tokens, cu_seqlens) = load(tmp_path, torch.float64), packed()
    with torch.no_grad():
        together = backbone(tokens, cu_seqlens)
        alone = torch.cat([backbone(t, torch.tensor([0, len(t)], dtype=torch.int32)) for t in texts])
    assert together.dtype == torch.float64
    assert relative(together, alone) < 1e-14


def test_bidirectional_attention_sees_the_future_and_only_its_own_text(tmp_path: Path) -> None:
    save_peer("mistral", tmp_path)
    backbone, (_, tokens, cu_seqlens) = load(tmp_path, causal=False), packed()
    changed = tokens.clone()
    last = int(cu_seqlens[3]) - 1  # the last token of the third text
    changed[last] = (changed[last] + 1) % 97
    with torch.no_grad():
        moved = (backbone(tokens, cu_seqlens) - backbone(changed, cu_seqlens)).abs().amax(1) > 1e-7
    inside = torch.zeros_like(moved)
    inside[int(cu_seqlens[2]) : int(cu_seqlens[3])] = True
    assert torch.equal(moved, inside)


@pytest.mark.parametrize("window", [None, 1, 3, 64])
@pytest.mark.parametrize("causal", [True, False])
def test_attention_equals_its_definition(window: int | None, causal: bool) -> None:
    lengths, heads, kv_heads = (1, 1, 9, 4), 4, 2
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(15, h, 8, generator=generator, dtype=torch.float64, requires_grad=True)
        for h in (heads, kv_heads, kv_heads)
    )
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    got = varlen_attention(q, k, v, cu_seqlens, scale=0.3, window=window, causal=causal)
    rows = []
    for first, last in zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:], strict=False):
        for i in range(first, last):
            seen = [j for j in range(first, last) if (j <= i or not causal) and (window is None or abs(i - j) < window)]
            for h in range(heads):
                scores = torch.stack([0.3 * q[i, h] @ k[j, h // 2] for j in seen]).softmax(0)
                rows.append(sum(p * v[j, h // 2] for p, j in zip(scores, seen, strict=True)))
    expected = torch.stack(rows).view(15, heads, 8)
    assert torch.allclose(got, expected, atol=1e-13)
    weight = torch.randn(got.shape, generator=generator, dtype=torch.float64)
    ours, theirs = (torch.autograd.grad((out * weight).sum(), (q, k, v)) for out in (got, expected))
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(ours, theirs, strict=True))


def test_attention_refuses_boundaries_that_do_not_fit() -> None:
    q = torch.randn(4, 2, 8)
    with pytest.raises(ValueError, match=r"must rise from 0 to 4: got \[0, 3\]"):
        varlen_attention(q, q, q, torch.tensor([0, 3], dtype=torch.int32), scale=1.0)
    with pytest.raises(ValueError, match="multiple of the key heads"):
        k = q[:, :1].expand(4, 3, 8)
        varlen_attention(q, k, k, torch.tensor([0, 4], dtype=torch.int32), scale=1.0)


def test_sizes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    save_peer("mistral", tmp_path)
    config = read_config(tmp_path)
    for change in ({"n_kv_heads": 4}, {"head_dim": 7}, {"rope_divisors": (1.0,)}):
        with pytest.raises(ValueError, match="must"):
            replace(config, **change)
