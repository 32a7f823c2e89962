"""A plan's memory is what a step allocates: on this CPU, and, run dry, on a GPU, at Mistral-7B's own sizes too."""

from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from faces import BUILT
from peaks import CPU, allocated_peak, built, predicted_over_counted, save_wider
from tiny_runs import ROOT, batch_of
from torch import Tensor

import e5kernels
from bench import dry_run as dry
from bench.models import MISTRAL, write_config
from bench.plan import CUDA, measure
from e5core.config import load_config
from e5core.distributed import World
from e5core.encoder import BackboneSource
from e5core.lora import LoraConfig
from e5core.loss import LossConfig
from e5core.memory import Setting
from e5core.recompute import Policy
from e5core.run import Config
from e5core.step import backward_step
from e5kernels import native

WHOLE = 100_000
each_policy = pytest.mark.parametrize("policy", ["none", "mlp", "block"])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model of each family."""
    root = tmp_path_factory.mktemp("wider")
    return {name: save_wider(name, root / name) for name in ("mistral", "qwen2", "qwen3", "gemma3")}


@pytest.fixture(scope="module")
def folder(folders: dict[str, Path]) -> Path:
    return folders["mistral"]


@BUILT
@each_policy
@pytest.mark.parametrize("budget", [250, 1000, WHOLE])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_step_s_peak_is_predicted_to_5_percent(policy: Policy, budget: int, dropout: float, folder: Path) -> None:
    assert predicted_over_counted(folder, policy, budget, dropout) == pytest.approx(1, abs=0.05)


@BUILT
@pytest.mark.parametrize("policy", ["none", "block"])
def test_so_it_is_where_the_mean_is_pooled(policy: Policy, folder: Path) -> None:
    assert predicted_over_counted(folder, policy, 250, pooling="mean") == pytest.approx(1, abs=0.05)


@BUILT
@each_policy
@pytest.mark.parametrize("fp8_skip", [(), ("w_down", "wo")])
def test_so_it_is_in_fp8(policy: Policy, fp8_skip: tuple[str, ...], folder: Path) -> None:
    assert predicted_over_counted(folder, policy, 250, fp8_skip=fp8_skip) == pytest.approx(1, abs=0.08)


@BUILT
@each_policy
@pytest.mark.parametrize("budget", [250, 1000, WHOLE])
def test_so_it_is_where_all_weights_are_trained(policy: Policy, budget: int, folder: Path) -> None:
    assert predicted_over_counted(folder, policy, budget, full=True) == pytest.approx(1, abs=0.05)


@BUILT
@each_policy
@pytest.mark.parametrize("variant", ["qwen2", "qwen3", "gemma3"])
def test_so_it_is_for_other_families(policy: Policy, variant: str, folders: dict[str, Path]) -> None:
    assert predicted_over_counted(folders[variant], policy, 250) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(
    ("policy", "dtype"),
    [("none", torch.float32), ("mlp", torch.float32), ("block", torch.float32), ("none", torch.bfloat16)],
)
def test_so_it_is_where_no_op_is_compiled(
    policy: Policy, dtype: torch.dtype, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("e5kernels.native.AVAILABLE", False)
    assert predicted_over_counted(folder, policy, 250, dtype=dtype) == pytest.approx(1, abs=0.08)


@BUILT
@each_policy
def test_to_compute_nothing_changes_no_allocation(
    policy: Policy, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dry, "SMALL", 2**16)  # of which ids and bounds are fewer bytes, activations more
    model, batch = built(folder, policy, 0.1), batch_of(folder, n=16)

    def peak() -> int:
        model.zero_grad()
        return allocated_peak(lambda: backward_step(model, batch, LossConfig(), 1000, (0, 0)))

    peak()  # what torch keeps from its first step on
    real = peak()
    with dry.Uncomputed() as seen:
        assert peak() == pytest.approx(real, rel=0.002)
    assert seen.n_left_out > 500


def test_a_dry_run_knows_all_rooms_that_have_faces() -> None:
    names = [file.stem for file in Path(e5kernels.__file__).parent.glob("*.py")]
    rooms = {room for name in names if hasattr(room := import_module(f"e5kernels.{name}"), "face")}
    assert rooms - {native} == set(dry.ROOMS)


def test_what_would_be_resized_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dry, "SMALL", 64)
    x = torch.ones(40, 40)
    with dry.Uncomputed(), pytest.raises(RuntimeError, match="resizes"):
        torch.add(x, 1, out=torch.empty(0))


def test_what_is_not_computed_has_the_form_of_what_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dry, "SMALL", 64)
    x, small = torch.randn(8, 12), torch.arange(4)

    def found() -> list[Tensor]:
        out = x.new_empty(8)
        summed = torch.sum(x, 1, out=out)
        held = x.clone()
        added = held.add_(1).addmm_(x, torch.ones(12, 12))
        results = [x.T @ x, x.bfloat16(), x[:, ::2] * 2, *x.max(1), small + 1, x.new_zeros(3), x.new_full((2,), 7.0)]
        assert summed is out and added is held and x.view(-1).data_ptr() == x.data_ptr()
        return [*results, out, held, torch.cat([x, x]), torch.zeros(100)]

    real = found()
    with dry.Uncomputed():
        uncomputed = found()
    for one, other in zip(real, uncomputed, strict=True):
        assert (one.shape, one.stride(), one.dtype, one.device) == (other.shape, other.stride(), other.dtype, CPU)
    assert uncomputed[5].tolist() == [1, 2, 3, 4] and uncomputed[7].tolist() == [7.0, 7.0]  # of small ones


CASES = [
    ("mistral", torch.bfloat16, "last", None),
    ("mistral", torch.float32, "last", None),
    ("mistral", torch.bfloat16, "mean", None),
    ("mistral", torch.bfloat16, "last", ()),
    ("mistral", torch.bfloat16, "last", ("wq", "wk", "wv", "wo")),
    ("qwen2", torch.bfloat16, "last", None),
    ("qwen3", torch.bfloat16, "last", None),
    ("gemma3", torch.bfloat16, "last", None),
    ("gemma3", torch.float32, "mean", None),
]


@each_policy
@pytest.mark.parametrize(("variant", "dtype", "pooling", "fp8_skip"), CASES)
def test_a_gpu_s_is_predicted_to_2_percent(
    policy: Policy, variant: str, dtype: torch.dtype, pooling: Any, fp8_skip: Any, folders: dict[str, Path]
) -> None:
    with dry.dry_run():
        ratio = predicted_over_counted(
            folders[variant], policy, 1000, dtype=dtype, pooling=pooling, fp8_skip=fp8_skip, device=CUDA
        )
    assert ratio == pytest.approx(1, abs=0.02)


@each_policy
@pytest.mark.parametrize("budget", [250, WHOLE])
def test_so_it_is_in_many_micro_batches_and_in_one(policy: Policy, budget: int, folder: Path) -> None:
    with dry.dry_run():
        ratio = predicted_over_counted(folder, policy, budget, dtype=torch.bfloat16, device=CUDA)
    assert ratio == pytest.approx(1, abs=0.02)


@each_policy
@pytest.mark.parametrize("variant", ["mistral", "gemma3"])
@pytest.mark.parametrize("budget", [250, 1000, WHOLE])
def test_so_it_is_to_3_percent_where_all_weights_are_trained(
    policy: Policy, variant: str, budget: int, folders: dict[str, Path]
) -> None:
    with dry.dry_run():
        ratio = predicted_over_counted(folders[variant], policy, budget, dtype=torch.bfloat16, full=True, device=CUDA)
    assert ratio == pytest.approx(1, abs=0.03)


def seven_b(folder: Path, **backbone: Any) -> Config:
    """The paper's training, of a folder that has no weights."""
    write_config(folder, MISTRAL, torch.bfloat16)
    config = load_config(Config, ROOT / "configs/e5_mistral_7b.toml")
    return replace(config, backbone=BackboneSource(path=str(folder), dtype="bfloat16", **backbone))


def ratio_at_7b(config: Config, policy: Policy, tokens: int, strategy: str = "none", world_size: int = 1) -> float:
    world = World(rank=0, world_size=world_size, device=CPU)
    with dry.dry_run():
        row = measure(config, Setting(strategy, tokens, policy), 128, world, CUDA)
    assert row["measured_mib"] > 3000
    return row["ratio"]


@pytest.mark.parametrize(("policy", "tokens"), [("none", 8192), ("none", 1024), ("mlp", 8192), ("block", 8192)])
def test_mistral_7b_s_is_predicted_to_half_a_percent(policy: Policy, tokens: int, tmp_path: Path) -> None:
    assert ratio_at_7b(seven_b(tmp_path), policy, tokens) == pytest.approx(1, abs=0.005)


def test_so_it_is_in_fp8_at_7b(tmp_path: Path) -> None:
    assert ratio_at_7b(seven_b(tmp_path, frozen_dtype="fp8"), "none", 8192) == pytest.approx(1, abs=0.005)


@pytest.mark.parametrize("policy", ["none", "block"])
def test_so_it_is_for_one_of_8_ranks_that_hold_an_eighth(policy: Policy, tmp_path: Path) -> None:
    assert ratio_at_7b(seven_b(tmp_path), policy, 8192, "full", 8) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("policy", ["none", "mlp", "block"])
def test_where_the_loss_is_the_fullest_moment_it_is_not_told_too_low(policy: Policy, tmp_path: Path) -> None:
    config = seven_b(tmp_path)
    write_config(tmp_path, replace(MISTRAL, n_layers=2), torch.bfloat16)
    with dry.dry_run():
        row = measure(config, Setting("none", 8192, policy), 4, World(rank=0, world_size=8, device=CPU), CUDA)
    assert row["candidates"] == 16_384 and 0.995 < row["ratio"] < 1.08


@pytest.mark.parametrize(("strategy", "world_size"), [("none", 1), ("full", 8)])
def test_so_it_is_at_7b_where_all_weights_are_trained(strategy: str, world_size: int, tmp_path: Path) -> None:
    config = seven_b(tmp_path)
    config = replace(config, lora=LoraConfig(), train=replace(config.train, full=True))
    assert ratio_at_7b(config, "mlp", 8192, strategy, world_size) == pytest.approx(1, abs=0.01)
