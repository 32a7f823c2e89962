"""A model whose frozen linears are in fp8: what it holds, what it computes, and a run that trained in it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from models import SIZES, VARIANTS, randomised, save_embedder, save_peer
from ranks import run_ranks
from shard_laws import in_fp8
from test_backbone import packed
from test_recompute import assert_same_bits, step
from tiny_runs import CONFIG, SYNTHETIC, equal_bitwise, lines_of, train_until
from torch import Tensor, nn

from e5core.backbone import FrozenLinear
from e5core.config import load_config
from e5core.distributed import ALONE
from e5core.encode import Encoder
from e5core.encoder import BackboneSource, EmbeddingModel, build_model
from e5core.export import export
from e5core.fp8 import check_fp8
from e5core.lora import LINEARS, LoraConfig, adapters
from e5core.memory import sizes_of
from e5core.merge import merge
from e5core.plan import main as plan_main
from e5core.recompute import Policy
from e5core.train import Config, train
from e5core.weights import tensors_of
from e5kernels.fp8 import E4M3, quantise_rows, quantise_rows_reference

CPU = torch.device("cpu")
FIRST_DOWN = "layers.0.feed_forward.w_down"


def built(
    folder: Path,
    skip: tuple[str, ...] | None = (),
    dtype: torch.dtype = torch.float32,
    policy: Policy = "none",
    targets: tuple[str, ...] | None = LINEARS,
) -> EmbeddingModel:
    """A model with random B (B = 0 makes dA = 0 and hides mistakes) whose adapters drop a tenth."""
    lora = None if targets is None else LoraConfig(rank=4, dropout=0.1, targets=targets)
    model = build_model(folder, dtype, CPU, causal=True, lora=lora, seed=3, recompute=policy, fp8_skip=skip)
    generator = torch.Generator().manual_seed(4)
    for _, linear in adapters(model.backbone):
        linear.lora_b.data.normal_(0, 0.1, generator=generator)
    return model


def save_aligned(variant: str, folder: Path) -> None:
    """Save a tiny model whose heads are of 16 channels, where its variant's are of 10 or 12."""
    config_class, model_class, changes = VARIANTS[variant]
    sizes = SIZES | changes | ({"head_dim": 16} if "head_dim" in changes else {})
    torch.manual_seed(0)
    randomised(model_class(config_class(**sizes))).save_pretrained(folder)


class Emulated(nn.Module):
    """A linear as fp8 defines it, forward alone, in float64."""

    def __init__(self, linear: FrozenLinear) -> None:
        super().__init__()
        self.weight, self.bias = self.back(linear.weight), linear.bias

    @staticmethod
    def back(x: Tensor) -> Tensor:
        q, scale = quantise_rows_reference(x)
        return q.double() * scale.double()

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(self.back(x), self.weight, self.bias)

    together = FrozenLinear.together


@pytest.mark.parametrize("variant", ["mistral-window", "qwen2-window", "qwen3-window", "gemma3"])
@pytest.mark.parametrize("skip", [(), ("wk", "w_up"), ("wq", "wo", "w_down"), ("wq", "wk", "wv", "w_gate", "w_up")])
def test_a_model_in_fp8_is_one_of_linears_in_fp8(variant: str, skip: tuple[str, ...], tmp_path: Path) -> None:
    save_aligned(variant, tmp_path)
    model = built(tmp_path, skip, torch.float64, targets=None)
    other = built(tmp_path, None, torch.float64, targets=None)
    for layer in other.backbone.layers:
        for room in (layer.attention, layer.feed_forward):
            for name, linear in list(room.named_children()):
                if name in LINEARS and name not in skip:
                    setattr(room, name, Emulated(linear))
    _, tokens, cu_seqlens = packed()
    got, expected = (each.backbone(tokens, cu_seqlens) for each in (model, other))
    assert (got - expected).norm() < 1e-6 * expected.norm()
    last = model.backbone(tokens, cu_seqlens, on_last=lambda: None)
    assert (last - expected[cu_seqlens[1:].long() - 1]).norm() < 1e-6 * last.norm()


def test_each_weight_is_held_twice_and_together_as_large_as_in_bf16(tmp_path: Path) -> None:
    save_peer("qwen2", tmp_path)
    skip = ("wo", FIRST_DOWN)
    model = built(tmp_path, skip, torch.bfloat16, targets=("wq", "w_down"))
    tensors = dict(tensors_of(tmp_path, model.backbone.config))
    n_held = 0
    for name, parameter in model.backbone.named_parameters():
        linear, _, leaf = name.rpartition(".")
        if leaf != "weight" or linear.rpartition(".")[2] not in LINEARS:
            continue
        module = model.backbone.get_submodule(linear)
        if linear == FIRST_DOWN or linear.endswith("wo"):
            assert parameter.dtype == torch.bfloat16 and module.weight_t is None
            continue
        n_held += 1
        for codes, scale, weight in (
            (module.weight, module.weight_scale, tensors[name]),
            (module.weight_t, module.weight_t_scale, tensors[name].T),
        ):
            expected = quantise_rows_reference(weight)
            assert torch.equal(codes.view(torch.uint8), expected[0].view(torch.uint8))
            assert torch.equal(scale, expected[1]) and not codes.requires_grad and not scale.requires_grad
        assert parameter.nbytes + module.weight_t.nbytes == weight.numel() * 2
    assert n_held == 3 * 6 - 1
    frozen = {name: p.nbytes for name, p in model.backbone.named_parameters() if not p.requires_grad}
    matrices = sum(n for name, n in frozen.items() if "w" in name.split(".")[-2][:1] and not name.endswith("bias"))
    assert sizes_of(model.backbone.config, LoraConfig(), fp8_skip=skip).matrices(2) == matrices
    assert sizes_of(model.backbone.config, LoraConfig()).matrices(2) == 2 * sum(
        tensor.numel() for name, tensor in tensors.items() if name.split(".")[-2] in LINEARS and tensor.ndim == 2
    )


@pytest.mark.parametrize("variant", ["mistral", "gemma3"])
@pytest.mark.parametrize("targets", [LINEARS, ("wv", "w_gate")])
def test_gradients_are_near_those_without_fp8(variant: str, targets: tuple[str, ...], tmp_path: Path) -> None:
    save_aligned(variant, tmp_path)
    got, expected = (step(built(tmp_path, skip, targets=targets)) for skip in ((), None))
    assert got.keys() == expected.keys()
    for name, one in got.items():
        cosine = torch.cosine_similarity(one.flatten(), expected[name].flatten(), 0)
        assert 0.9 < cosine < 0.99999, name


@pytest.mark.parametrize("policy", ["mlp", "block"])
def test_recompute_moves_no_bit(policy: Policy, tmp_path: Path) -> None:
    save_peer("mistral", tmp_path)
    for skip in ((), ("wk", "w_down")):
        assert_same_bits(step(built(tmp_path, skip, policy=policy)), step(built(tmp_path, skip)))


def test_a_replay_quantises_nothing_for_the_product_that_it_spares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_peer("mistral", tmp_path)
    seen: list[tuple[int, ...]] = []
    monkeypatch.setattr(
        "e5kernels.fp8.quantise_rows", lambda x, f=quantise_rows: (seen.append(tuple(x.shape)), f(x))[1]
    )
    counts = {}
    for policy in ("none", "block"):
        seen.clear()
        model = built(tmp_path, (), policy=policy)
        hidden, n_before = model.backbone.config.hidden_dim, len(seen)
        step(model)
        counts[policy] = [shape[1] == hidden for shape in seen[n_before:]].count(True)
    assert counts["block"] == counts["none"], "of w_down's inputs, and of the gradients of gate and up"


def test_attention_is_left_out_where_nothing_is_named() -> None:
    assert BackboneSource(path="x", frozen_dtype="fp8").skipped == ("wq", "wk", "wv", "wo")
    assert BackboneSource(path="x", frozen_dtype="fp8", fp8_skip=()).skipped == ()
    assert BackboneSource(path="x").skipped is None


def test_a_layer_is_skipped_whole(tmp_path: Path) -> None:
    save_peer("mistral", tmp_path)
    held = {name for name, p in built(tmp_path, ("layers.0", "wo")).backbone.named_parameters() if p.dtype == E4M3}
    assert {name.split(".")[1] for name in held} == {"1", "2"}
    assert held == {name for name in held if ".wo." not in name} and len(held) == 2 * 6 * 2


def test_what_fp8_cannot_hold_is_refused_by_name(tmp_path: Path) -> None:
    save_peer("qwen3-window", tmp_path)  # q and k of 6 and 2 heads of 10
    with pytest.raises(ValueError, match=r"layers.0.attention.wq is 60 x 48, and fp8 .* multiples of 16; name it in"):
        built(tmp_path)
    built(tmp_path, ("wq", "wk", "wv", "wo"))
    with pytest.raises(ValueError, match=r"names no linear: got \['layers.3.attention.wq', 'w_out'\], allowed are wq"):
        built(tmp_path, ("wq", "wk", "wv", "wo", "w_out", "layers.3.attention.wq"))
    with pytest.raises(ValueError, match=r"names no linear: got \['layers.3'\], .* or \"layers.1\""):
        built(tmp_path, ("layers.0", "layers.1", "layers.2", "layers.3"))
    with pytest.raises(ValueError, match="leaves no linear to fp8; set backbone.frozen_dtype=same"):
        built(tmp_path, LINEARS)
    with pytest.raises(ValueError, match="fp8_skip = .'wo'. needs frozen_dtype"):
        BackboneSource(path="x", fp8_skip=("wo",))


def test_a_gpu_without_fp8_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    for capability, dtype, told in (
        ((8, 0), torch.bfloat16, r"needs a GPU of compute capability 8.9 .* got NVIDIA A100 with 8.0; train with"),
        ((9, 0), torch.float32, "needs bfloat16 activations on a GPU: got torch.float32; set"),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        with pytest.raises(ValueError, match=told):
            check_fp8(torch.device("cuda", 0), dtype)
    for capability in ((8, 9), (9, 0), (10, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        check_fp8(torch.device("cuda", 0), torch.bfloat16)


def test_a_sharded_model_gathers_the_same_codes(tmp_path: Path) -> None:
    save_embedder(tmp_path, 3)
    alone = in_fp8(ALONE, str(tmp_path), "none")
    for rank in run_ranks(2, in_fp8, str(tmp_path), "full"):
        assert rank["most_gathered"] == 2
        for name in ("embeddings", "gradient"):
            np.testing.assert_allclose(rank[name], alone[name], rtol=0, atol=1e-9 * np.abs(alone[name]).max())


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fp8")
    embedder = save_embedder(folder / "base")
    text = CONFIG.format(run=folder / "run", model=embedder, data=SYNTHETIC / "en_sts.jsonl")
    file = folder / "config.toml"
    file.write_text(text.replace('dtype = "float32"', 'dtype = "float32"\nfrozen_dtype = "fp8"\nfp8_skip = ["wo"]'))
    return file


@pytest.fixture(scope="module")
def run(config_file: Path) -> Path:
    config = load_config(Config, config_file, [])
    train(config)
    return Path(config.train.run)


def test_a_run_remembers_fp8_and_encodes_in_it_unless_a_dtype_is_named(run: Path) -> None:
    texts, encoder = ["a tram", "vaccines train the immune system"], Encoder.load(str(run))
    assert encoder.model.fp8_skip == ("wo",)
    layer = encoder.model.backbone.layers[1]
    assert layer.attention.wq.weight.dtype == E4M3 and layer.attention.wo.weight.dtype == torch.float32
    assert encoder.selfcheck() > 1 - 1e-5 and encoder.golden_tolerance == 1e-2
    plain = Encoder.load(str(run), dtype="float32")
    assert plain.model.fp8_skip is None and plain.golden is None
    cosines = (plain.encode(texts) * encoder.encode(texts)).sum(1)
    assert (0.9 < cosines).all() and (cosines < 0.99999).all()
    card = json.loads((run / "step_6" / "e5core.json").read_text())
    assert (card["frozen_dtype"], card["fp8_skip"]) == ("fp8", ["wo"])


def test_an_interrupted_run_goes_on_to_the_same_bits_and_not_without_fp8(
    run: Path, config_file: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    with pytest.raises(KeyboardInterrupt):
        train_until(load_config(Config, config_file, [f"train.run={other}"]), 3)
    resumed = [f"train.run={other}", "train.resume=true"]
    with pytest.raises(ValueError, match="backbone.frozen_dtype was 'fp8', is 'same'"):
        train(load_config(Config, config_file, [*resumed, "backbone.frozen_dtype=same", "backbone.fp8_skip=[]"]))
    train(load_config(Config, config_file, resumed))
    assert equal_bitwise(run, other, 6) and lines_of(run) == lines_of(other)


def test_an_export_merges_into_the_weights_as_the_file_has_them(run: Path, tmp_path: Path) -> None:
    assert export(str(run), tmp_path / "merged", "merged")["e5core"] > 0.999999
    assert merge(tmp_path / "both", [str(run), str(run)], "linear") < 1e-6
    assert Encoder.load(str(tmp_path / "both")).model.fp8_skip == ("wo",)


def test_a_plan_counts_both_copies_and_refuses_a_card_without_fp8(
    config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan_main([str(config_file), "--gpu", "h100"]) == 0
    assert "frozen weights" in capsys.readouterr().out
    assert plan_main([str(config_file), "--gpu", "a100-80"]) == 2
    assert "a100-80 has no products in fp8" in capsys.readouterr().err
