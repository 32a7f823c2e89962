"""What runs on a GPU mixes no devices and waits for the GPU only where it must: told on a fake one (fake_gpu.py)."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_gpu import META, FakeGpu, fake_gpu
from models import save_embedder
from tiny_runs import CONFIG, ROOT, SYNTHETIC, batch_of
from torch import Tensor

from e5core import distributed, run, saving
from e5core.cards import CARDS
from e5core.config import load_config
from e5core.distributed import World
from e5core.encode import main as encode_main
from e5core.encoder import EmbeddingModel, build_model
from e5core.evaluate import main as evaluate_main
from e5core.mine import main as mine_main
from e5core.optim import OptimConfig
from e5core.run import Config
from e5core.step import backward_step, make_optimizer
from e5core.text_encoder import Encoder, ShownEncoder
from e5core.tokenizer import Tokenizer
from e5core.train import main as train_main
from e5core.verify_grad import main as verify_main
from e5kernels.rms_norm import rms_norm

AT_THE_END = {"step.py:backward_step": 1}  # whether the loss is finite
OPTIONS: list[list[str]] = [
    [],
    ["backbone.frozen_dtype=fp8"],
    ["backbone.pooling=mean"],
    ["loss.matryoshka=[32,8]"],
    ["loss.margin=0.1"],
    ["train.full=true"],
]


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_embedder(tmp_path_factory.mktemp("embedder") / "model")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    """A fake GPU that is this process's device."""

    def on_host(tensor: Tensor) -> Tensor:
        return torch.zeros(tensor.shape, dtype=tensor.dtype)  # as saving.py copies, which CUDA alone can do

    monkeypatch.setattr(distributed, "_device", lambda: META)
    monkeypatch.setattr(run, "card_of", lambda device: CARDS["h100"])
    monkeypatch.setattr(saving, "_on_host", on_host)
    with fake_gpu() as found:
        yield found


def model_of(config: Config, folder: Path, policy: Any, strategy: Any, world: World) -> EmbeddingModel:
    source, form = config.backbone, {"strategy": strategy, "world": world, "recompute": policy}
    form |= {"pooling": source.pooling, "fp8_skip": source.skipped, "full": config.train.full}
    return build_model(folder, torch.bfloat16, META, causal=True, lora=config.adapters, seed=0, **form)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "".join(options) or "plain")
@pytest.mark.parametrize(
    ("policy", "strategy", "n_ranks"), [("none", "none", 1), ("block", "none", 2), ("mlp", "full", 2)]
)
def test_a_step_waits_for_the_gpu_at_its_end_alone(  # ranks that watch for SIGTERM wait for one another besides
    options: list[str], policy: str, strategy: str, n_ranks: int, embedder: Path, gpu: FakeGpu
) -> None:
    config = load_config(Config, ROOT / "configs/e5_mistral_7b.toml", [f"backbone.path={embedder}", *options])
    world = World(rank=0, world_size=n_ranks, device=META)
    model, batch = model_of(config, embedder, policy, strategy, world), batch_of(embedder, n=8, world=world)
    optimizer = make_optimizer(model, OptimConfig())
    assert not gpu.mixed
    gpu.begin()
    backward_step(model, batch, config.loss, 250, (0, 0), world)
    assert gpu.waits == AT_THE_END
    gpu.begin()
    optimizer.clip_gradients()
    optimizer.update(1e-4)
    assert gpu.reads == {"optim.py:clip_gradients": 1} and not gpu.mixed


@pytest.mark.parametrize("batch_tokens", [10_000, 50])
def test_to_encode_waits_for_the_gpu_once(batch_tokens: int, embedder: Path, gpu: FakeGpu) -> None:
    config = load_config(Config, ROOT / "configs/e5_mistral_7b.toml", [f"backbone.path={embedder}"])
    model = model_of(config, embedder, "none", "none", World(rank=0, world_size=1, device=META))
    encoder = Encoder(model, Tokenizer.load(embedder), META, 512)
    encoder.batch_tokens = batch_tokens
    ShownEncoder(encoder).encode([f"text number {i}" for i in range(60)])
    assert gpu.waits == {"text_encoder.py:_encode_chunk": 1} and not gpu.mixed


def test_the_fake_gpu_tells_what_a_gpu_would_not_do(gpu: FakeGpu) -> None:
    there, here = torch.ones(4, 4, device=META), torch.ones(4, 4)
    assert not gpu.mixed and not gpu.reads
    there @ here  # a GPU refuses it
    rms_norm(there, torch.ones(4), 1e-6)  # a kernel would read this CPU's memory
    assert len(gpu.mixed) == 2
    there * torch.tensor(2.0)
    there.copy_(here)
    assert len(gpu.mixed) == 2 and not gpu.reads
    for n in (1, 2, 3):
        there = there @ there
        assert there.sum().item() == 1 and gpu.waits.total() == n
    gpu.begin()
    reads = (there.cpu, there.sum().item, lambda: bool(there.any()), there.tolist, lambda: here.copy_(there))
    for n, read in enumerate(reads, 1):
        read()
        assert gpu.reads.total() == n


@pytest.mark.parametrize("options", [[], ["backbone.frozen_dtype=fp8"]], ids=["bf16", "fp8"])
def test_a_training_and_what_follows_mix_no_devices(
    options: list[str], embedder: Path, tmp_path: Path, gpu: FakeGpu
) -> None:
    file, trained, texts = tmp_path / "config.toml", str(tmp_path / "run"), tmp_path / "texts.jsonl"
    file.write_text(CONFIG.format(run=trained, model=embedder, data=SYNTHETIC / "en_sts.jsonl"))
    texts.write_text("".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(50)))
    assert train_main([str(file), "backbone.dtype=bfloat16", "train.steps=3", *options]) == 0
    sets = ["--retrieval", str(ROOT / "data/retrieval/scifact-small"), "--max-queries", "5"]
    assert evaluate_main([trained, *sets]) == 0
    assert encode_main([trained, "--input", str(texts), "--output", str(tmp_path / "v.npy"), "--vectors", "int8"]) == 0
    mined = ["--queries", str(SYNTHETIC / "en_sts.jsonl"), "--out", str(tmp_path / "mined.jsonl")]
    assert mine_main([trained, "--corpus", str(texts), *mined]) == 0
    assert verify_main([str(file), "backbone.dtype=float32"]) == 0
    assert not gpu.mixed
