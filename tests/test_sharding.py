"""A sharded model trains and encodes as a whole one does, and each rank holds and sends what the layout says."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import moments, save_embedder
from rank_laws import CPU, DTYPES, LORA
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from shard_laws import BUDGETS, CASES, N_STEPS, four_ranks, fully_trained, loaded, training, two_ranks, vectors
from tiny_runs import CONFIG, SYNTHETIC

from e5core import checkpoint
from e5core.distributed import ALONE
from e5core.encoder import EmbeddingModel
from e5core.lora import LoraConfig
from e5core.memory import Load, Ranks, Setting, ledger, sizes_of
from e5core.sharding import Shards, settle_strategy
from e5core.weights import read_config

N_LAYERS = 4
TOLERANCES = {"float64": 1e-12, "float32": 2e-5}
DTYPE_BYTES = {"float64": 8, "float32": 4}


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_embedder(tmp_path_factory.mktemp("embedder"), N_LAYERS)
    weights = load_file(folder / "model.safetensors")
    sharp = {name: 3 * tensor if "q_proj" in name or "k_proj" in name else tensor for name, tensor in weights.items()}
    save_file(sharp, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def four(embedder: Path) -> list[dict[Any, Any]]:
    return run_ranks(4, four_ranks, str(embedder), local_size=2)


@pytest.fixture(scope="module")
def config_file(embedder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("trainings") / "config.toml"
    text = CONFIG.format(run=file.parent / "none", model=embedder, data=SYNTHETIC / "en_sts.jsonl")
    text = text.replace("steps = 6", "steps = 4").replace("lr = 1e-3", "lr = 2e-4")
    text = text.replace("max_tokens = 48", "max_tokens = 140")  # past the instruction
    file.write_text(text + "[loss]\ntemperature = 0.5\n")
    return file


@pytest.fixture(scope="module")
def two(embedder: Path, config_file: Path) -> list[dict[str, Any]]:
    return run_ranks(2, two_ranks, str(embedder), str(config_file))


@pytest.fixture(scope="module")
def one(embedder: Path) -> dict[str, Any]:
    return {dtype: training(ALONE, str(embedder), "none", dtype, BUDGETS[0]) for dtype in TOLERANCES}


def distance(got: np.ndarray, wanted: np.ndarray) -> float:
    assert got.shape == wanted.shape
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


def assert_same_training(got: dict[str, Any], wanted: dict[str, Any], tolerance: float) -> None:
    assert got["losses"] == pytest.approx(wanted["losses"], rel=min(tolerance, 1e-6))
    assert got["norms"] == pytest.approx(wanted["norms"], rel=4 * tolerance)  # of later steps, which amplify rounding
    assert min(wanted["norms"]) > 0.05  # it was clipped
    for what in ("gradient", "adapters", "moments"):
        assert distance(got[what], wanted[what]) < (4 if what == "moments" else 1) * tolerance, what  # sums of squares


@pytest.mark.parametrize("case", CASES)
def test_a_training_is_that_of_one_process(
    case: tuple[str, str, int], four: list[dict[Any, Any]], one: dict[str, Any]
) -> None:
    wanted = one[case[1]]
    assert len(set(wanted["losses"])) == N_STEPS and wanted["losses"][0] > 0.5
    for rank in four:
        assert_same_training(rank[case], wanted, TOLERANCES[case[1]])
        assert rank[case]["losses"] == four[0][case]["losses"]


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_one_rank_may_be_sharded_and_moves_no_bit(dtype: str, embedder: Path, one: dict[str, Any]) -> None:
    wanted, got = one[dtype], training(ALONE, str(embedder), "full", dtype, BUDGETS[0])
    for what in ("gradient", "adapters", "moments"):
        assert np.array_equal(got[what], wanted[what]), what
    assert got["storages"] == 0 and got["traffic"]["most_gathered"] == 2


@pytest.mark.parametrize("policy", ["mlp", "block"])
def test_recompute_moves_no_bit_of_a_sharded_training(policy: str, four: list[dict[Any, Any]]) -> None:
    for rank in four:
        wanted, got = rank["full", "float64", BUDGETS[0]], rank[policy]
        assert got["losses"] == wanted["losses"] and np.array_equal(got["adapters"], wanted["adapters"])
        assert got["traffic"] == wanted["traffic"]


def test_two_passes_are_one_pass(four: list[dict[Any, Any]]) -> None:
    for rank in four:
        many, whole = (rank["full", "float64", budget] for budget in BUDGETS)
        assert many["n_micro_batches"][0] > 1 and whole["n_micro_batches"][0] == 1
        assert_same_training(many, whole, 1e-12)


def layout(embedder: Path, world_size: int, itemsize: int) -> list[dict[bool, int]]:
    """The bytes of a rank's part of every unit, the root last, {of trained: bytes, of frozen: bytes}."""
    with torch.device("meta"):
        model = EmbeddingModel(read_config(embedder), LoraConfig(rank=4))
    units: list[dict[bool, int]] = []
    for module in (*model.backbone.layers, None):
        named = dict(module.named_parameters() if module is not None else model.named_parameters())
        own = [p for name, p in named.items() if module is not None or ".layers." not in name]
        padded = {kind: sum(-(-p.numel() // 16) * 16 for p in own if p.requires_grad == kind) for kind in (True, False)}
        units.append({kind: -(-n // (16 * world_size)) * 16 * itemsize for kind, n in padded.items()})
    return units


@pytest.mark.parametrize("case", [case for case in CASES if case[0] == "full"])
def test_the_bytes_that_are_moved_are_those_of_the_layout(
    case: tuple[str, str, int], four: list[dict[Any, Any]], embedder: Path
) -> None:
    """Of M micro-batches: M forward passes, a backward pass, and M - 1 forward and backward passes.

    The unit in which one ends is whole when the next begins there.
    """
    itemsize, size = DTYPE_BYTES[case[1]], 4
    *blocks, root = layout(embedder, size, itemsize)
    block = sum(blocks[0].values())
    assert all(sum(unit.values()) == block for unit in blocks) and len(blocks) == N_LAYERS
    m = max(rank[case]["n_micro_batches"][0] for rank in four)
    n_gathers = m * N_LAYERS + (2 * m - 1) * (N_LAYERS - 1)
    for rank in four:
        traffic, calls = (rank[case][name] for name in ("traffic", "calls"))
        assert traffic["gathered_bytes"] == (size - 1) * (n_gathers * block + sum(root.values()))
        assert sum(calls["gather"]) == traffic["gathered_bytes"] and len(calls["gather"]) == traffic["n_gathers"]
        assert traffic["n_reductions"] == N_LAYERS  # once a step, whatever the micro-batches; the root is frozen
        assert traffic["reduced_bytes"] == (size - 1) * N_LAYERS * blocks[0][True]
        losses = len(calls["scatter"]) - N_LAYERS  # the embeddings' gradients
        assert losses == 1 and sum(calls["scatter"][losses:]) == traffic["reduced_bytes"]
        assert max(calls["all_reduce"]) <= 3 * 8  # sums of the loss; no gradient


def test_hybrid_gathers_in_the_node_and_adds_up_across(four: list[dict[Any, Any]], embedder: Path) -> None:
    *blocks, root = layout(embedder, 2, 8)
    m = max(rank["hybrid", "float64", BUDGETS[0]]["n_micro_batches"][0] for rank in four)
    n_gathers = m * N_LAYERS + (2 * m - 1) * (N_LAYERS - 1)
    for rank in four:
        case = rank["hybrid", "float64", BUDGETS[0]]
        assert case["traffic"]["gathered_bytes"] == n_gathers * sum(blocks[0].values()) + sum(root.values())
        assert sum(nbytes == blocks[0][True] for nbytes in case["calls"]["all_reduce"]) == N_LAYERS
        assert case["traffic"]["reduced_bytes"] == 2 * N_LAYERS * blocks[0][True]
        assert case["kept"] == sum(sum(unit.values()) for unit in (*blocks, root))


def test_a_rank_holds_its_part_and_at_most_two_units_at_a_time(
    four: list[dict[Any, Any]], one: dict[str, Any], embedder: Path
) -> None:
    for rank in four:
        for dtype, itemsize in DTYPE_BYTES.items():
            full, none = rank["full", dtype, BUDGETS[0]], one[dtype]
            assert full["storages"] == full["gradients left"] == 0  # nothing whole is left between steps
            assert full["kept"] == sum(sum(unit.values()) for unit in layout(embedder, 4, itemsize))
            assert full["kept"] < 0.26 * none["storages"]
        cases = [case for case in rank.values() if case["traffic"] is not None]
        assert {case["traffic"]["most_gathered"] for case in cases} == {2}


@pytest.mark.parametrize("case", [*CASES, ("full", "float64", 110, "one")])
def test_the_root_and_two_blocks_are_whole_at_once_as_a_plan_counts_them(
    case: tuple[str, ...], four: list[dict[Any, Any]], embedder: Path
) -> None:
    (strategy, name, budget, *alone), sizes = case, sizes_of(read_config(embedder), LORA)
    ranks = Ranks(1) if alone else Ranks(4, per_node=2)
    runs = [training(ALONE, str(embedder), *case[:3])] if alone else [rank[case] for rank in four]
    shards = ranks.shards(strategy)
    *blocks, root = layout(embedder, shards, DTYPE_BYTES[name])
    whole = shards * (2 * sum(blocks[0].values()) + sum(root.values()))
    assert [found["whole"] for found in runs] == [[whole]] * len(runs)
    load = Load(budget, 0, budget, 28, 7, 21)
    planned = ledger(sizes, Setting(strategy, budget, "none"), ranks, load, DTYPES[name], CPU)["gathered units"]
    assert planned == pytest.approx(whole, rel=0.02)  # less what is laid out at multiples of 16 numbers


def test_the_slices_of_all_ranks_are_the_whole(four: list[dict[Any, Any]]) -> None:
    slices = [rank["full", "float64", BUDGETS[0]]["slices"] for rank in four]
    for name, (_, _, shape) in slices[0].items():
        end = 0
        for start, length, other in (own[name] for own in slices):
            assert other == shape and (start == end or length == 0)
            end += length
        assert end == np.prod(shape)


def test_encoding_is_that_of_one_process_with_1_micro_batch_here_and_5_there(
    two: list[dict[str, Any]], embedder: Path
) -> None:
    alone = vectors(ALONE, str(embedder), "none")
    assert alone["n_forwards"] == 6 + 1 + 6
    for rank in two:
        found = rank["vectors"]
        for got, wanted in zip(found["vectors"], alone["vectors"], strict=True):
            assert np.abs(got - wanted).max() < 2e-6
        assert found["n_first"] == 2 * 5 * N_LAYERS + 1  # five passes; frozen and trained; the root once
        assert found["storages"] == 0 and found["most"] == 2


def test_twenty_steps_are_those_of_fully_shard(two: list[dict[str, Any]]) -> None:
    for rank in two:
        found = rank["beside fully_shard"]
        assert distance(found["begun"], found["theirs"]) > 1e-2
        assert found["curves"][0] == pytest.approx(found["curves"][1], rel=1e-9) and len(found["curves"][0]) == 20
        assert distance(found["ours"], found["theirs"]) < 1e-10


def test_training_all_weights_is_that_of_one_process(two: list[dict[str, Any]], embedder: Path) -> None:
    alone = fully_trained(ALONE, str(embedder), "none")
    assert len(set(alone["losses"])) == N_STEPS
    for rank in two:
        found = rank["fully trained"]
        assert found["losses"] == pytest.approx(alone["losses"], rel=1e-11)
        assert distance(found["weights"], alone["weights"]) < 1e-12
        assert found["reductions"] == N_STEPS * 3 * (N_LAYERS + 1)


def random_model(folder: Path) -> Path:
    """Write a Llama of 308 MB in fp32, whose largest tensor has 12."""
    folder.mkdir()
    sizes = {"vocab_size": 259, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 6}
    sizes |= {"num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 512}
    config = {"model_type": "llama", "architectures": ["LlamaModel"], "rms_norm_eps": 1e-5, "rope_theta": 1e4} | sizes
    (folder / "config.json").write_text(json.dumps(config))
    matrices = {"self_attn.q_proj": (1024, 1024), "self_attn.k_proj": (1024, 1024), "self_attn.v_proj": (1024, 1024)}
    matrices |= {"self_attn.o_proj": (1024, 1024), "mlp.gate_proj": (2816, 1024), "mlp.up_proj": (2816, 1024)}
    matrices |= {"mlp.down_proj": (1024, 2816), "input_layernorm": (1024,), "post_attention_layernorm": (1024,)}
    tensors = {f"layers.{i}.{name}.weight": torch.ones(shape) for i in range(6) for name, shape in matrices.items()}
    tensors |= {"embed_tokens.weight": torch.ones(259, 1024), "norm.weight": torch.ones(1024)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_loading_safetensors_takes_the_shard_and_one_tensor(tmp_path: Path) -> None:
    for rank in run_ranks(2, loaded, str(random_model(tmp_path / "model")), "float32"):
        assert rank["shard"] < 0.51 * rank["whole"]
        assert rank["growth"] <= rank["shard"] + rank["largest"] + 2**26 < rank["whole"]
        assert rank["growth"] > 0.9 * rank["shard"]  # it was measured


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_loading_a_gguf_file_takes_the_shard_and_three_tensors(smollm2_file: Path) -> None:
    for rank in run_ranks(2, loaded, str(smollm2_file), "float32"):
        assert rank["shard"] < 0.51 * rank["whole"]
        assert 0.9 * rank["shard"] < rank["growth"] <= rank["shard"] + 3 * rank["largest"] + 2**26


def test_auto_leaves_one_rank_whole(embedder: Path) -> None:
    with torch.device("meta"):
        model = EmbeddingModel(read_config(embedder), None)
    assert settle_strategy("auto", model, ALONE) == ("none", "auto: one rank")
    assert settle_strategy("hybrid", model, ALONE) == ("hybrid", "as configured")


def test_a_parameter_of_two_modules_and_a_wrong_shape_are_refused() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"0.weight must have the shape \(3, 3\): got \(3, 2\)"):
        Shards(model, list(model), ALONE, ALONE).put("0.weight", torch.ones(3, 2))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match="two modules share a parameter"):
        Shards(model, list(model), ALONE, ALONE)


@pytest.mark.parametrize("name", ["full", "resumed"])
def test_a_sharded_run_writes_what_another_writes_and_goes_on_with_it(
    name: str, two: list[dict[str, Any]], config_file: Path
) -> None:
    one, other = config_file.parent / "none", config_file.parent / name
    metrics = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (one, other)]
    assert len(metrics[0]) == len(metrics[1]) == 4
    for wanted, got in zip(*metrics, strict=True):
        assert got["loss"] == pytest.approx(wanted["loss"], rel=1e-6)
        assert got["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-4)
    folders = [checkpoint.step_folder(run, 4) for run in (one, other)]
    for read in (lambda folder: load_file(folder / "adapter_model.safetensors"), moments):
        wanted, got = map(read, folders)
        assert wanted.keys() == got.keys() and len(got) >= 2 * 7 * N_LAYERS
        for tensor in wanted:
            assert wanted[tensor].any()  # sharded models of others have written empty adapters
            assert (got[tensor] - wanted[tensor]).norm() <= 1e-4 * wanted[tensor].norm(), tensor
