"""A plan's products are what runs, its formulas those of paper and pencil; its memory: tests/test_memory.py."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from faces import BUILT
from peaks import CPU, built, save_wider
from tiny_runs import CONFIG, ROOT, SYNTHETIC, batch_of
from torch.utils._python_dispatch import TorchDispatchMode

from bench.models import MISTRAL, write_config
from e5core.batches import BatchConfig, pack
from e5core.cards import CARDS
from e5core.config import load_config
from e5core.encoder import Pooling
from e5core.estimate import estimate, flops_of, make_plan, traffic_of
from e5core.lora import LoraConfig
from e5core.loss import LossConfig
from e5core.memory import Load, Ranks, Setting, Sizes, ledger, sizes_of
from e5core.plan import main
from e5core.recompute import Policy
from e5core.run import Config
from e5core.step import backward_step
from e5core.train import main as train_main
from e5core.weights import read_config
from e5core.workload import Workload, assumed

WHOLE = 100_000
CUDA = torch.device("cuda")
each_policy = pytest.mark.parametrize("policy", ["none", "mlp", "block"])


@pytest.fixture(scope="module")
def seven_b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with Mistral-7B's config.json and nothing else."""
    folder = tmp_path_factory.mktemp("seven_b")
    write_config(folder, MISTRAL, torch.bfloat16)
    return folder


@pytest.fixture(scope="module")
def sizes(seven_b: Path) -> Sizes:
    return sizes_of(read_config(seven_b), LoraConfig())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_wider("mistral", tmp_path_factory.mktemp("wider"))


class Products(TorchDispatchMode):
    """Counts the FLOPs of all matrix products, by their operands."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        name = op.overloadpacket
        if name in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            a, b = args[-2:]
            self.total += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        return op(*args, **(kwargs or {}))


@BUILT
@pytest.mark.parametrize(
    ("policy", "budget", "pooling"),
    [(policy, budget, "last") for policy in get_args(Policy) for budget in (1000, WHOLE)] + [("block", 1000, "mean")],
)
def test_a_step_s_products_are_counted_exactly(policy: Policy, budget: int, pooling: Pooling, folder: Path) -> None:
    model, batch = built(folder, policy, 0.0, pooling=pooling), batch_of(folder, n=16)
    with Products() as counter:
        backward_step(model, batch, LossConfig(), budget, (0, 0))
    fullest = max(pack(batch.sequences, budget, CPU), key=lambda piece: len(piece.tokens))
    sizes = sizes_of(model.backbone.config, LoraConfig(rank=4), pooling)
    unseen = (0.0, 0.0)  # attention's scores are no mm
    forward, backward, again = flops_of(sizes, batch.n_tokens, len(batch.sequences), unseen, policy)
    once, *_ = flops_of(sizes, len(fullest.tokens), len(fullest.rows), unseen, policy)
    expected = 2 * forward + backward + again - once
    c = model.backbone.config
    n_qkv = (c.n_heads + 2 * c.n_kv_heads) * c.head_dim
    expected -= 2 * batch.n_tokens * (c.dim * n_qkv + 3 * c.dim * 4)  # the embedding needs no gradient
    expected += 3 * 2 * 16 * 32 * c.dim  # the loss
    assert counter.total == expected


def test_the_paper_s_adapters_are_41_943_040_numbers(sizes: Sizes) -> None:
    assert sizes.adapters == 41_943_040
    assert sizes.block == 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336
    assert 32 * sizes.block + sizes.norms + sizes.root == 7_110_660_096  # Mistral-7B less its 131,072,000 of the head


def test_traffic_is_what_paper_and_pencil_give(sizes: Sizes) -> None:
    bf16, candidates = torch.bfloat16, 4096
    alone, node, cluster = Ranks(1), Ranks(8), Ranks(64)
    assert traffic_of(sizes, "none", alone, 5, candidates, bf16, CUDA) == (0, 0, 0)
    got = traffic_of(sizes, "none", node, 5, candidates, bf16, CUDA)
    assert got == (0, 2 * 7 / 8 * 4 * 41_943_040, 2 * 7 / 8 * 4096 * 4096 * 4)
    room = 16 * (4096 + 2 * 1024 + 4096 + 2 * 14336 + 4096)  # for B behind the matrices: 16 rows of each
    blocks = 2 * 32 * (218_103_808 + room) + 4 * 65 * 4096 + 4 * 41_943_040  # bf16 matrices, fp32 norms and adapters
    embeddings = 2 * 32_000 * 4096
    # 9 forwards; 5 backwards, which begin where those ended
    got = traffic_of(sizes, "full", node, 5, candidates, bf16, CUDA)
    units = pytest.approx(7 / 8 * ((9 * 31 + 5 * 32) / 32 * blocks + embeddings))
    assert got.units == units
    assert got.gradients == 7 / 8 * 4 * 41_943_040
    one = traffic_of(sizes, "full", node, 1, candidates, bf16, CUDA)
    assert one.units == pytest.approx(7 / 8 * (63 / 32 * blocks + embeddings))
    got = traffic_of(sizes, "hybrid", cluster, 5, candidates, bf16, CUDA)
    assert got.units == units
    assert got.gradients == (7 / 8 + 2 * 7 / 8 / 8) * 4 * 41_943_040


def test_shards_divide_what_is_frozen_and_what_adamw_holds(sizes: Sizes) -> None:
    load = Load(8192, 8192, 100_000, 768, 256, 4096)
    whole, shard = (
        ledger(sizes, Setting(strategy, 8192, "none"), Ranks(8), load, torch.bfloat16, CUDA)
        for strategy in ("none", "full")
    )
    for name in ("frozen weights", "adapters (fp32)", "AdamW's moments"):
        assert shard[name] == pytest.approx(whole[name] / 8, abs=1)
    block = 2 * 218_791_936 + 4 * 41_943_040 // 32  # and its norms
    assert shard["gathered units"] == pytest.approx(2 * block + 2 * 32_000 * 4096, rel=1e-3)  # tests/test_sharding.py
    assert shard["activations kept"] == whole["activations kept"]
    assert sum(shard.values()) < sum(whole.values())


def paper_plan(sizes: Sizes, card: str, world_size: int = 1, strategy: str = "auto") -> tuple[Setting, bool]:
    batch = BatchConfig(micro_batch_tokens="auto", recompute="auto")
    ranks = Ranks(world_size)
    made = make_plan(sizes, assumed(batch, 879), batch, strategy, ranks, CARDS[card], torch.bfloat16)
    return made.chosen.setting, made.does_fit


def test_the_choice_follows_the_card(sizes: Sizes) -> None:
    chosen = {card: paper_plan(sizes, card) for card in ("rtx4090", "a100-40", "a100-80", "h100", "h200")}
    assert all(fits and setting.strategy == "none" for setting, fits in chosen.values())
    tokens = [setting.micro_batch_tokens for setting, _ in chosen.values()]
    assert tokens == sorted(tokens) and tokens[0] < tokens[1] < tokens[2] < tokens[-1]
    assert chosen["a100-80"][0] == chosen["h100"][0]  # as much memory
    assert paper_plan(sizes, "h100", 8)[0].strategy == "none"  # a 7B fits; to gather it gains nothing
    small = replace(CARDS["rtx4090"], memory_mib=12_000)
    batch = BatchConfig(micro_batch_tokens="auto", recompute="auto")
    for world_size, fits, strategy in ((1, False, "none"), (8, True, "full")):
        work = assumed(batch, 879)
        made = make_plan(sizes, work, batch, "auto", Ranks(world_size), small, torch.bfloat16)
        assert (made.does_fit, made.chosen.setting.strategy) == (fits, strategy)
        assert ("NOTHING FITS" in made.why) is not fits


def test_a_setting_that_is_given_is_kept_and_a_small_batch_is_one_pass(sizes: Sizes) -> None:
    work = Workload(
        n_steps=10, batch_size=4, candidates=2.0, tokens=300, spread=0, longest=200, seen=50, source="here"
    )  # fmt: skip
    batch = BatchConfig(size=4, micro_batch_tokens=700, recompute="mlp")
    made = make_plan(sizes, work, batch, "none", Ranks(1), CARDS["h100"], torch.bfloat16)
    assert made.chosen.setting == ("none", 700, "mlp") and made.chosen.n_micro_batches == 2
    forward, backward, again = flops_of(sizes, 1200, 12, (50, 100), "mlp")
    assert made.chosen.flops == pytest.approx(forward * (2 - 700 / 1200) + backward + again)
    one = make_plan(
        sizes, work, replace(batch, micro_batch_tokens="auto"), "none", Ranks(1), CARDS["h100"], torch.bfloat16
    )
    assert one.chosen.setting.micro_batch_tokens == 1216 and one.chosen.n_micro_batches == 1
    slow = estimate(sizes, work, one.chosen.setting, Ranks(8), CARDS["rtx4090"], torch.bfloat16)
    assert slow.exposed_s >= slow.hidden_s


def test_what_fp8_skips_gains_no_speed(sizes: Sizes) -> None:
    work, setting = assumed(BatchConfig(size=64), 1), Setting("none", 8192, "none")
    same, fast, partly = (
        estimate(one, work, setting, Ranks(1), CARDS["h100"], torch.bfloat16).compute_s
        for one in (
            sizes_of(sizes.config, LoraConfig(), fp8_skip=skip) for skip in (None, (), ("wq", "wk", "wv", "wo"))
        )
    )
    assert (same - partly) / (same - fast) == pytest.approx(3 * 14336 / (3 * 14336 + 2.5 * 4096), abs=0.05)


@pytest.fixture
def config_file(folder: Path, tmp_path: Path) -> Path:
    file = tmp_path / "config.toml"
    file.write_text(CONFIG.format(run=tmp_path / "run", model=folder, data=SYNTHETIC / "en_sts.jsonl"))
    return file


AUTO = ["batch.micro_batch_tokens=auto", "batch.recompute=auto"]


def test_training_settles_auto_tells_its_memory_and_keeps_to_it_when_resumed(
    config_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert train_main([str(config_file), *AUTO, "train.steps=2"]) == 0
    told = capfd.readouterr().err
    batch = load_config(Config, run / "config.toml").batch
    assert batch.recompute == "none" and 500 < batch.micro_batch_tokens < 5000  # a whole step fits this machine
    assert f"micro_batch_tokens {batch.micro_batch_tokens}, recompute none" in told
    plan_text = (run / "plan.txt").read_text()
    for shown in (told, plan_text):
        assert "activations kept" in shown
        predicted, measured = re.search(r"memory: ([\d,]+) MiB predicted, ([\d,]+) MiB measured", shown).groups()
        assert int(predicted.replace(",", "")) > 100 and int(measured.replace(",", "")) > 100
    saved = (run / "config.toml").read_text()
    (run / "config.toml").write_text(saved.replace(f"= {batch.micro_batch_tokens}\n", "= 130\n"))
    assert train_main([str(config_file), *AUTO, "train.steps=2", "train.resume=true"]) == 0
    assert "micro_batch_tokens 130, recompute none (as the run began)" in capfd.readouterr().err


LITTLE_MEMORY = """
import resource, sys
import torch
from e5core.train import main
torch.ones(300, 300) @ torch.ones(300, 300)
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + 600 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_where_memory_runs_out_the_run_ends_with_its_plan_and_what_to_lower(config_file: Path) -> None:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LITTLE_MEMORY, str(config_file), "batch.size=900", "train.steps=1"]
    command += ["batch.micro_batch_tokens=100000"]
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2, result.stderr
    assert "out of memory" in result.stderr and "Traceback" not in result.stderr
    assert "activations kept" in result.stderr and "lower batch.micro_batch_tokens (now 100000" in result.stderr


def test_the_command_line_plans_the_paper_s_run_from_config_json_alone(
    seven_b: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    command = ["configs/e5_mistral_7b.toml", f"backbone.path={seven_b}", "--gpu", "h100", "--steps", "879"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "41,943,040 trainable" in shown and "879 steps of 2,048 examples" in shown
    assert "log-normal, assumed" in shown and "predicted, not measured" in shown
    assert "strategy = none  micro_batch_tokens = 8192  recompute = none" in shown
    assert main([*command, "--gpu", "rtx4090"]) == 1
    assert "IT DOES NOT FIT" in capsys.readouterr().out
    assert main(["configs/e5_mistral_7b.toml", "backbone.path=./none"]) == 2
    assert "no such model" in capsys.readouterr().err


def test_the_command_line_counts_tokens_and_steps_where_it_can(
    config_file: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(config_file), "--gpu", "cpu", "--strategy", "none"]) == 0
    shown = capsys.readouterr().out
    assert "6 steps of 8 examples" in shown and "examples of the training records, tokenised" in shown
    assert "strategy = none  micro_batch_tokens = 400  recompute = none" in shown


@pytest.mark.parametrize("name", ["e5_mistral_full", "e5_mistral_7b_8xh100"])
def test_assumed_lengths_need_no_records_but_an_epoch_s_steps_do(
    name: str, seven_b: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where no source of any config is
    command = [str(ROOT / f"configs/{name}.toml"), f"backbone.path={seven_b}", "--assume-lengths", "--gpu", "h100"]
    assert main([*command, "--steps", "879"]) == 0
    head, _, run = capsys.readouterr().out.partition("the run:")
    assert "run        879 steps of 2,048 examples" in head and "h with gathering hidden" in run
    assert main(command) == 0
    unknown_head, _, unknown_run = capsys.readouterr().out.partition("the run:")
    assert unknown_head == head.replace("879 steps", "an unknown number of steps")
    assert "train.epochs counts records, which --assume-lengths leaves unread; give --steps N" in unknown_run


def test_assumed_lengths_take_the_steps_that_a_config_gives(
    config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config_file.write_text(config_file.read_text().replace(str(SYNTHETIC), "nowhere"))
    assert main([str(config_file), "--gpu", "cpu", "--assume-lengths"]) == 0
    assert "6 steps of 8 examples" in capsys.readouterr().out
    assert main([str(config_file), "--gpu", "cpu"]) == 2
    assert "nowhere" in capsys.readouterr().err
