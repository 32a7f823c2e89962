"""The adapters are PEFT's, their dropout is a function of keys, and nothing of them is left out in silence."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from models import save_peer
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from test_backbone import packed, relative

from e5core.adapter import write_adapter
from e5core.backbone import BackboneConfig
from e5core.batches import pack
from e5core.encoder import EmbeddingModel, build_model
from e5core.lora import LINEARS, LoraConfig, adapters
from e5kernels.dropout import keyed_dropout, mix, mix_tensor

MISTRAL_7B = BackboneConfig(
    family="mistral", dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, head_dim=128, hidden_dim=14336,
    vocab_size=32000, norm_eps=1e-5, rope_theta=10_000.0, window=4096, max_positions=32768,
)  # fmt: skip
PEFT_NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def adapted(folder: Path, lora: LoraConfig, dtype: torch.dtype = torch.float32) -> EmbeddingModel:
    """A model with random B (B = 0 makes dA = 0 and hides mistakes)."""
    model = build_model(folder, dtype, torch.device("cpu"), causal=True, lora=lora, seed=3)
    generator = torch.Generator().manual_seed(4)
    for _, linear in adapters(model.backbone):
        linear.lora_b.data.normal_(0, 0.1, generator=generator)
    return model


def test_the_paper_s_adapter_has_41_943_040_parameters() -> None:
    with torch.device("meta"):
        model = EmbeddingModel(MISTRAL_7B, LoraConfig())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 41_943_040
    assert sum(p.numel() for p in model.parameters()) == 7_110_660_096 + 41_943_040  # Mistral-7B without its head


@pytest.mark.parametrize("variant", ["mistral-window", "llama3", "qwen2-window", "qwen3-window", "gemma3"])
@pytest.mark.parametrize("targets", [LINEARS, ("wq", "wv")])
def test_outputs_and_gradients_equal_peft(variant: str, targets: tuple[str, ...], tmp_path: Path) -> None:
    peer = save_peer(variant, tmp_path)
    model = adapted(tmp_path, LoraConfig(rank=4, alpha=10.0, dropout=0.0, targets=targets))
    names = [PEFT_NAMES[LINEARS.index(target)] for target in targets]
    theirs = get_peft_model(peer, PeftConfig(r=4, lora_alpha=10, lora_dropout=0.0, target_modules=names))
    modules = {name.removeprefix("base_model.model."): m for name, m in theirs.named_modules() if hasattr(m, "lora_A")}
    parts = dict(zip(LINEARS, PEFT_NAMES, strict=True))
    pairs = []
    for name, linear in adapters(model.backbone):
        head, _, leaf = name.rpartition(".")
        head = head.replace("attention", "self_attn").replace("feed_forward", "mlp")
        module = modules[f"{head}.{parts[leaf]}"]
        module.lora_A["default"].weight.data.copy_(linear.lora_a.data)
        module.lora_B["default"].weight.data.copy_(linear.lora_b.data)
        pairs.append((name, linear, module))
    assert len(pairs) == len(modules) == 3 * len(targets)
    texts, tokens, cu_seqlens = packed()
    weight = torch.randn(len(tokens), 48, generator=torch.Generator().manual_seed(2))
    got = model.backbone.norm(model.backbone(tokens, cu_seqlens))
    expected = torch.cat([theirs(text[None]).last_hidden_state[0] for text in texts])
    assert relative(got, expected) < 1e-5
    (got * weight).sum().backward()
    (expected * weight).sum().backward()
    for name, linear, module in pairs:
        assert relative(linear.lora_a.grad, module.lora_A["default"].weight.grad) < 1e-5, name
        assert relative(linear.lora_b.grad, module.lora_B["default"].weight.grad) < 1e-5, name


def test_a_saved_adapter_loads_in_peft(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    peer, lora = save_peer("mistral", tmp_path / "base"), LoraConfig(rank=4, alpha=10.0, dropout=0.0)
    model, folder = adapted(tmp_path / "base", lora), tmp_path / "adapter"
    folder.mkdir()
    write_adapter(folder, dict(model.masters()), lora, str(tmp_path / "base"))
    theirs = PeftModel.from_pretrained(peer, folder)
    assert not [w for w in recwarn if "missing adapter keys" in str(w.message)]
    texts, tokens, cu_seqlens = packed()
    with torch.no_grad():
        expected = torch.cat([theirs(text[None]).last_hidden_state[0] for text in texts])
        assert relative(model.backbone.norm(model.backbone(tokens, cu_seqlens)), expected) < 1e-5


@pytest.mark.parametrize("variant", ["mistral", "qwen2"])  # without and with a bias
def test_the_function_s_gradient_with_dropout_is_right(variant: str, tmp_path: Path) -> None:
    save_peer(variant, tmp_path)
    model = adapted(tmp_path, LoraConfig(rank=2, dropout=0.3), torch.float64)
    linear = next(module for _, module in adapters(model.backbone))
    model.token_keys.set(0, 0, torch.arange(5), torch.zeros(5, dtype=torch.int64))
    x = torch.randn(5, 48, dtype=torch.float64, requires_grad=True)

    def function(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(linear, {"lora_a": a, "lora_b": b}, (x,))

    assert torch.autograd.gradcheck(function, (x, linear.lora_a, linear.lora_b))


def test_dropout_bits_are_splitmix64_of_the_key() -> None:
    keys, stream, drop_below, channels = [0, 5, -1, -(2**63), 123456789], 0xFEDCBA9876543210, 77, 21
    ones = torch.ones(len(keys), channels, dtype=torch.float64)
    got = keyed_dropout(ones, torch.tensor(keys), stream, drop_below)
    signed_stream = stream - 2**64  # as LoraLinear passes it
    assert torch.equal(got, keyed_dropout(ones, torch.tensor(keys), signed_stream, drop_below))
    for t, key in enumerate(keys):
        for c in range(channels):
            word = mix(((key ^ stream) + (c // 8) * 0x9E3779B97F4A7C15) % 2**64)
            byte = (word >> (8 * (c % 8))) & 255
            assert got[t, c] == (0 if byte < drop_below else 256 / (256 - drop_below))
    assert mix(0) == 0xE220A8397B1DCDAF  # first output of the published splitmix64 with seed 0
    values = [0, 1, -1, 2**62, -(2**63)]
    assert [v % 2**64 for v in mix_tensor(torch.tensor(values)).tolist()] == [mix(v % 2**64) for v in values]


def test_dropout_drops_its_share_independently() -> None:
    kept = keyed_dropout(torch.ones(4000, 576), mix_tensor(torch.arange(4000)), mix(1), 26).numpy() > 0
    share, n = 26 / 256, kept.size
    assert abs((~kept).mean() - share) < 5 * math.sqrt(share * (1 - share) / n)
    for axis in (0, 1):  # neighbours in position and in channel are dropped together no more often than by chance
        a, b = np.delete(kept, 0, axis), np.delete(kept, -1, axis)
        assert abs((~a & ~b).mean() - share**2) < 5 * math.sqrt(share**2 / a.size)


def test_dropout_depends_on_every_part_of_its_key(tmp_path: Path) -> None:
    save_peer("mistral", tmp_path)
    model = adapted(tmp_path, LoraConfig(rank=2, dropout=0.5))
    x, linears = torch.ones(2, 48), [module for _, module in adapters(model.backbone) if module.weight.shape[1] == 48]

    def draw(linear: int, seed: int = 0, step: int = 0, row: int = 3, position: int = 1) -> torch.Tensor:
        model.token_keys.set(seed, step, torch.tensor([row, 7]), torch.tensor([position, 2]))
        keys, stream = model.token_keys.keys, mix(model.token_keys.step_key + linears[linear].number)
        return keyed_dropout(x, keys, stream, 128)

    base = draw(0)
    assert torch.equal(base, draw(0))
    others = [draw(1), draw(6), draw(0, seed=1), draw(0, step=1), draw(0, row=4), draw(0, position=0)]
    assert all(not torch.equal(base[0], other[0]) for other in others)
    assert torch.equal(base[1], draw(0, row=4)[1])  # another row's tokens keep their mask


def test_embeddings_with_dropout_do_not_depend_on_packing(tmp_path: Path) -> None:
    save_peer("mistral-window", tmp_path)
    model = adapted(tmp_path, LoraConfig(rank=4, dropout=0.1), torch.float64)
    texts, _, _ = packed()
    sequences, results = [text.tolist() for text in texts], []
    with torch.no_grad():
        for budget in (1, 25, 1000):
            rows = torch.empty(len(sequences), 48, dtype=torch.float64)
            for piece in pack(sequences, budget, torch.device("cpu")):
                rows[piece.rows] = model(piece, dropout=(5, 9))
            results.append(rows)
        plain = model(pack(sequences, 1000, torch.device("cpu"))[0])
    assert relative(results[0], results[2]) < 1e-13 and relative(results[1], results[2]) < 1e-13
    assert relative(plain, results[2]) > 1e-2  # dropout was on


def test_target_names_are_checked() -> None:
    with pytest.raises(ValueError, match="match no linear: got .'q_proj'.*allowed are wq, wk"):
        LoraConfig(targets=("q_proj",))
    with pytest.raises(ValueError, match="match no linear"):
        LoraConfig(targets=())
    with pytest.raises(ValueError, match="twice"):
        LoraConfig(targets=("wq", "wq"))
