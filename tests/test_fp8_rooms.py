"""A model in fp8 whose skipped linears have room for their adapters: the kernels' numbers, whatever is skipped."""

from pathlib import Path

import numpy as np
import pytest
import torch
from faces import DEVICE, by_triton
from models import save_embedder, save_peer
from ranks import run_ranks
from shard_laws import in_rooms, small_steps
from test_backbone import relative
from test_spare_columns import assert_same_bits, block_operations, built, rooms, step

from e5core.distributed import ALONE
from e5core.encoder import EmbeddingModel
from e5core.fp8 import CAPABILITY, apply_fp8
from e5core.lora import LINEARS, LoraConfig, adapters, make_room
from e5core.memory import Load, Ranks, Setting, ledger, room_numbers, sizes_of
from e5core.recompute import Policy
from e5core.sharding import Strategy
from e5core.weights import read_config
from e5kernels.lora_linear import room_behind

FIRST_DOWN = "layers.0.feed_forward.w_down"
QKV = LINEARS[:3]
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter: on GPUs fp8 is in bf16")


def spares(model: EmbeddingModel) -> list[list[int]]:
    """The spare columns of what each group of READERS reads, layer by layer."""
    makers = [(x.attention_norm, x.attention, x.ffn_norm, x.feed_forward) for x in model.backbone.layers]
    return [[maker.spare for maker in layer] for layer in makers]


@interpreted
@pytest.mark.parametrize(
    ("skip", "targets", "with_rooms", "expected"),
    [
        pytest.param((), LINEARS, set(), [[0, 0, 0, 0]] * 2, marks=pytest.mark.slow),
        (("w_down",), LINEARS, {"w_down"}, [[0, 0, 0, 16]] * 2),
        (QKV, LINEARS, {*QKV}, [[16, 0, 0, 0]] * 2),
        (("wk", "wo", "w_gate", FIRST_DOWN), LINEARS, {"wo", "w_down"}, [[0, 16, 0, 16], [0, 16, 0, 0]]),
        pytest.param(
            ("w_gate", "w_up"), ("wq", "w_gate", "w_up"), {"w_gate", "w_up"}, [[0, 0, 16, 0]] * 2,
            marks=pytest.mark.slow,
        ),
        pytest.param(
            (*QKV, "w_up"), ("wq", "wk", "w_gate", "w_up"), set(), [[0, 0, 0, 0]] * 2, marks=pytest.mark.slow
        ),
    ],
)  # fmt: skip
def test_what_fp8_skips_has_room_where_all_that_read_with_it_are_skipped_and_adapted(
    skip: tuple[str, ...],
    targets: tuple[str, ...],
    with_rooms: set[str],
    expected: list[list[int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save_embedder(tmp_path)
    plain = step(built(tmp_path, targets, fp8_skip=skip))
    by_triton(monkeypatch)
    model = built(tmp_path, targets, fp8_skip=skip)
    assert rooms(model) == with_rooms and spares(model) == expected
    got = step(model)
    assert got.keys() == plain.keys()
    for name, values in got.items():  # a number at a tie may be rounded either way, by an eighth
        assert relative(values, plain[name]) < 1e-3, name


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < CAPABILITY, reason="a GPU without fp8"
)
@pytest.mark.parametrize(
    ("skip", "cases"),
    [
        (("w_down",), [("block", "full"), ("mlp", "none")]),
        pytest.param((*QKV, "wo"), [("mlp", "full")], marks=pytest.mark.slow),
    ],
)
def test_neither_recompute_nor_sharding_moves_a_bit(
    skip: tuple[str, ...], cases: list[tuple[Policy, Strategy]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_embedder(tmp_path)
    by_triton(monkeypatch)
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    expected = step(built(tmp_path, dtype=dtype, fp8_skip=skip))
    for policy, strategy in cases:
        model = built(tmp_path, policy=policy, strategy=strategy, dtype=dtype, fp8_skip=skip)
        assert_same_bits(step(model), expected)


@interpreted
def test_the_norms_of_a_block_in_fp8_add_as_those_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_peer("mistral-window", tmp_path)
    by_triton(monkeypatch)
    forward, backward = block_operations(built(tmp_path, fp8_skip=()))
    assert forward["add"] == 1 and "add" not in backward, "the residual"


@pytest.mark.slow  # two processes that interpret kernels
@interpreted
def test_two_ranks_that_gather_codes_and_weights_with_room_do_the_references_steps(tmp_path: Path) -> None:
    save_embedder(tmp_path)
    skip = ("w_down", *QKV)
    ranks = run_ranks(2, in_rooms, str(tmp_path), skip)
    expected = small_steps(ALONE, str(tmp_path), "none", [0, 1], skip)["gradients"]
    first = np.linalg.norm(expected[0])
    assert np.linalg.norm(expected[1] - expected[0]) > 0.01 * first, "B has moved, and another is to be seen"
    for rank in ranks:
        for got, gradient in zip(rank["gradients"], expected, strict=True):
            assert np.linalg.norm(got - gradient) < 1e-3 * first


@pytest.mark.parametrize(
    ("skip", "targets", "n_spare"),
    [
        (None, LINEARS, 2 * 64),
        (None, ("wq", "wv", "w_down"), 2 * 16),
        ((), LINEARS, 0),
        (("w_down",), LINEARS, 2 * 16),
        (("wk", "wo", "w_gate", FIRST_DOWN), LINEARS, 3 * 16),
        ((*QKV, "w_up"), ("wq", "wk", "w_gate", "w_up"), 0),
    ],
)
def test_a_plan_counts_the_rooms_that_are_there(
    skip: tuple[str, ...] | None,
    targets: tuple[str, ...],
    n_spare: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save_embedder(tmp_path)
    by_triton(monkeypatch)
    config, lora, bf16 = read_config(tmp_path), LoraConfig(rank=3, targets=targets), torch.bfloat16
    with torch.device("meta"):
        model = EmbeddingModel(config, lora)
    if skip is not None:
        apply_fp8(model.backbone, skip)
    make_room(model.backbone, bf16, DEVICE)
    behind = sum(room_behind(linear.weight) * len(linear.weight) for _, linear in adapters(model.backbone))
    sizes = sizes_of(config, lora, "mean", skip)  # by a mean all blocks are alike
    assert config.n_layers * room_numbers(sizes, bf16, DEVICE) == behind
    setting, load = Setting("none", 10, "none"), Load(10, 0, 10, 2, 1, 1)
    kept = ledger(sizes, setting, Ranks(1), load, bf16, DEVICE)["activations kept"]
    monkeypatch.setattr("e5kernels.lora_linear.face", lambda device: "reference")
    without = ledger(sizes, setting, Ranks(1), load, bf16, DEVICE)["activations kept"]
    assert sum(map(sum, spares(model))) == n_spare
    assert kept - without == 10 * bf16.itemsize * n_spare
