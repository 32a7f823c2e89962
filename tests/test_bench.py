"""Every bench of bench/ runs on the CPU at tiny sizes, tells what a row must tell, and the workload is DESIGN's."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.models import SIZES, random_model
from bench.op import Case, Settings, Work, rows_of, run
from bench.roofline import Roofline
from bench.workloads import packed_lengths, triple_lengths, triples
from e5core.encoder import BackboneSource
from e5core.lora import LoraConfig, adapters

CPU = torch.device("cpu")
OPS = ("attention", "dropout", "infonce", "last_token", "lora_linear", "rms_norm", "rope", "swiglu")
TINY = ["--device", "cpu", "--size", "tiny", "--tokens", "40", "--rep-ms", "1"]


def rows_in(file: Path) -> list[dict[str, Any]]:
    """Read what a bench wrote."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_w64_is_the_workload_of_the_design() -> None:
    queries, positives, negatives = triple_lengths(64)
    assert sum(map(sum, (queries, positives, negatives))) == 25_669
    assert 64 * max(queries) + 128 * max(*positives, *negatives) == 79_040  # padded
    batch = triples(64, 100)
    assert batch.n_tokens == 25_669 and len(batch.sequences) == 192 and batch.n_queries == 64
    assert [len(batch.sequences[64 + j]) for j in (0, 1, 2)] == [positives[0], negatives[0], positives[1]]
    assert sum(packed_lengths(8192)) == 8192


@pytest.mark.parametrize("op", OPS)
def test_an_op_s_bench_checks_and_times_every_mode(op: str, tmp_path: Path) -> None:
    cases = importlib.import_module(f"bench.{op}").cases
    assert run(op, cases, [*TINY, "--no-compile", "--out", str(tmp_path / "rows.jsonl")]) == 0
    rows = rows_in(tmp_path / "rows.jsonl")
    ours = [row for row in rows if row.get("check")]
    assert ours and {row["check"] for row in ours} == {"passed"}
    modes = {"forward"} if op == "dropout" else {"forward", "backward", "both"}
    assert {row["mode"] for row in ours} == modes
    for row in rows:
        assert row["op"] == op and row["shape"] and row["dtype"] == "float32" and row["device"] and row["commit"]
        if "skipped" not in row:
            assert 0 < row["p20_ms"] <= row["ms"] <= row["p80_ms"] and row["roofline_percent"] >= 0
            assert ("gb_per_s" in row) != ("tflop_per_s" in row) and row["extra_mib"] >= 0
    assert any("no-compile" in row["skipped"] for row in rows if "skipped" in row)


def case_of(function: Any) -> Case:
    """A case whose implementation is to double its input."""
    work = {"forward": Work(8), "backward": Work(8)}
    return Case(shape="4 x 8", inputs=[torch.randn(4, 8)], reference=lambda x: 2 * x, ours={"ours": function}, **work)


def test_a_wrong_forward_or_backward_pass_fails_the_check() -> None:
    class WrongBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return 2.1 * g

    roofline = Roofline(1e9, {torch.float32: 1e9})
    for function, verdict in (
        (lambda x: x + x, "passed"),
        (lambda x: 2.001 * x, "failed"),
        (lambda x: 2 * x + torch.nan, "failed"),
        (WrongBackward.apply, "failed"),
    ):
        rows = [row for row in rows_of(case_of(function), roofline, CPU, "quick", 1.0) if "check" in row]
        assert [row["check"] for row in rows] == [verdict] * 3


def test_an_op_s_bench_ends_with_1_where_a_check_failed(tmp_path: Path) -> None:
    flags = [*TINY, "--no-compile", "--out", str(tmp_path / "rows.jsonl")]
    assert run("wrong", lambda settings: iter([case_of(lambda x: 3 * x)]), flags) == 1


def test_what_runs_out_of_memory_is_told_and_the_others_run() -> None:
    def too_large(x: Tensor) -> Tensor:
        return torch.empty(2**60) + x

    case = case_of(too_large)
    rows = list(rows_of(case, Roofline(1e9, {torch.float32: 1e9}), CPU, "quick", 1.0))
    assert [row["failed"] for row in rows if row["implementation"] == "ours"] == ["out of memory"]
    assert len([row for row in rows if row["implementation"] == "eager torch"]) == 3


def test_a_case_s_settings_have_the_decoder_s_shapes() -> None:
    settings = Settings(CPU, torch.bfloat16, "7b", [8192])
    assert settings.config.hidden_dim == 14336 and settings.randn(2, 3).dtype == torch.bfloat16


def test_a_random_model_is_whole_in_the_dtypes_of_a_loaded_one() -> None:
    lora = LoraConfig()
    model = random_model(SIZES["tiny"], BackboneSource(path="random"), lora, torch.bfloat16, CPU)
    assert not any(p.is_meta for p in model.parameters())
    assert all(p.isfinite().all() for p in model.parameters())
    assert model.backbone.norm.weight.dtype == torch.float32 and (model.backbone.norm.weight == 1).all()
    linears = list(adapters(model.backbone))
    assert len(linears) == 7 * 3 and all(linear.lora_a.any() and not linear.lora_b.any() for _, linear in linears)
