"""Every bench of bench/ runs on the CPU at tiny sizes, tells what a row must tell, and the workload is DESIGN's."""

import importlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

import bench.full_size
import bench.plan
import bench.step_profile
from bench.models import MISTRAL, SIZES, linears, random_model, write_model
from bench.op import Case, Settings, Work, rows_of, run
from bench.padded import grouped
from bench.rivals import rival_model, rival_step
from bench.roofline import Roofline, record
from bench.step_limit import Limit, Product, model_flops, products_of
from bench.step_profile import OTHER, UPDATE, Part, kind_of
from bench.step_rows import RIVALS, own_step, parser_of, run_rows, variants, verdicts
from bench.workloads import packed_lengths, triple_lengths, triples
from e5core.batches import pack
from e5core.encoder import BackboneSource
from e5core.lora import LINEARS, LoraConfig, adapters
from e5core.tokenizer import Tokenizer

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


def test_what_raises_is_told_and_fails_the_bench_and_the_others_run(tmp_path: Path) -> None:
    def broken(x: Tensor) -> Tensor:
        raise OutOfResources(300_000, 232_448, "shared memory")

    case, file = replace(case_of(broken), unchecked={"doubled": lambda x: x + x}), tmp_path / "rows.jsonl"
    assert run("broken", lambda settings: iter([case]), [*TINY, "--no-compile", "--out", str(file)]) == 1
    rows = rows_in(file)
    (told,) = (row["failed"] for row in rows if row["implementation"] == "ours")
    assert told.startswith("OutOfResources: out of resource: shared memory, Required: 300000")
    assert len([row for row in rows if row["implementation"] == "doubled" and row["ms"] > 0]) == 3


def test_a_row_is_told_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    record({"ms": 1.0}, CPU, tmp_path / "rows.jsonl")
    assert [(row["ms"], row["commit"]) for row in rows_in(tmp_path / "rows.jsonl")] == [(1.0, "")]


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


def test_a_steps_products_are_counted_layer_by_layer() -> None:
    """Two micro-batches of 5 and 3 tokens, 2 and 1 texts: the fullest goes forward once."""
    config = replace(SIZES["tiny"], n_layers=3)
    packed = pack([[1] * 3, [1] * 2, [1] * 3], 5, CPU)
    assert [(len(p.tokens), len(p.rows)) for p in packed] == [(5, 2), (3, 1)]
    counted, (n_in, n_out) = products_of(config, packed), linears(config)["wk"]
    assert counted[Product(5, n_in, n_out, False)] == 2 * 3  # wk and wv, which all layers have whole
    assert counted[Product(3, n_in, n_out, False)] == 2 * 2 * 3
    assert counted[Product(5, n_in, n_out, True)] == 2 * 2  # the first layer's lead to nothing
    assert counted[Product(2, *linears(config)["w_gate"], False)] == 2  # the last layer's see last tokens
    assert counted[Product(1, *linears(config)["w_gate"], False)] == 2 * 2
    assert [counted[Product(5, *linears(config)["w_down"], is_dx)] for is_dx in (False, True)] == [2, 2]
    once = sum(one.flops * n for one, n in counted.items() if one.rows in (5, 2))
    twice = sum(one.flops * n / (1 if one.is_dx else 2) for one, n in counted.items() if one.rows in (3, 1))
    assert model_flops(config, packed) == once + twice
    attention = ("wq", "wk", "wv", "wo")
    others = [name for name in LINEARS if name not in attention]
    assert products_of(config, packed, attention) + products_of(config, packed, others) == counted
    assert Limit(config, CPU).seconds(packed, torch.float32) > 0


def test_rivals_do_the_same_work_as_ours() -> None:
    """In fp32 all begin with the same loss, whatever adapters draw, since every B is 0; then all learn."""
    batch, config = triples(6, SIZES["tiny"].vocab_size, 30), SIZES["tiny"]
    model = random_model(config, BackboneSource(path="random"), LoraConfig(dropout=0.0), torch.float32, CPU)
    peers = [rival_model(rival, model, 0.0) for rival in RIVALS]
    backward, update = own_step(model, batch, 100)
    losses = []
    for _ in range(2):
        losses.append(backward().item())
        update()
    assert losses[0] != losses[1]
    for rival, peer in zip(RIVALS, peers, strict=True):
        step = rival_step(rival, peer, batch, CPU)
        assert abs(step().item() - losses[0]) < 2e-4
        assert step().item() < losses[0]


def test_rows_may_be_grouped_in_order_and_by_length() -> None:
    batch = triples(4, 100)
    in_order, by_length = grouped(batch, "in-order-5"), grouped(batch, "sorted-5")
    assert in_order == [list(range(5)), list(range(5, 10)), [10, 11]]
    lengths = [len(batch.sequences[row]) for rows in by_length for row in rows]
    assert lengths == sorted(lengths) and len(lengths) == 12


def test_the_step_s_rows_and_what_they_are_held_to(tmp_path: Path) -> None:
    flags = "--device cpu --random tiny --layers 1 --triples 3 4 --longest 20 --runs 1".split()
    parser = parser_of("rows")
    parser.add_argument("--micro-batch-tokens", type=int, default=80)
    arguments = parser.parse_args([*flags, "--no-rivals", "--variant", "backbone.pooling=mean"])
    run_rows(arguments, torch.float32, CPU, tmp_path / "rows.jsonl")
    rows = rows_in(tmp_path / "rows.jsonl")
    timed = [row for row in rows if "tokens_per_s" in row]
    assert {(row["mode"], row["triples"], row["dropout"]) for row in timed} == {
        (f"ours {form}", n, dropout)
        for form in ("bf16", "backbone.pooling=mean")
        for n in (3, 4)
        for dropout in (0.0, 0.1)
    }
    assert all(row["limit_percent"] > 0 and row["mfu_percent"] > 0 and row["micro_batches"] > 1 for row in timed)
    with pytest.raises(ValueError, match=r"backbone\.poling: unknown key"):
        variants(parser.parse_args([*flags, "--variant", "backbone.poling=mean"]), CPU)
    arguments.row_deadline = -1.0
    run_rows(arguments, torch.float32, CPU, tmp_path / "late.jsonl")
    assert {row["skipped"] for row in rows_in(tmp_path / "late.jsonl")} == {"the deadline of -1 s is over"}


def test_a_row_that_raises_does_not_end_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = "--device cpu --random tiny --layers 1 --triples 3 --longest 20 --runs 1".split()
    parser = parser_of("rows")
    parser.add_argument("--micro-batch-tokens", type=int, default=80)

    def no_rival(*_: object) -> dict[str, Any]:
        raise RuntimeError("python -m bench.rivals ended with 1:\nTraceback\nImportError: no peft")

    monkeypatch.setattr("bench.step_rows.rival_row", no_rival)
    with pytest.raises(RuntimeError, match=f"{len(RIVALS)} rows failed, first of them transformers"):
        run_rows(parser.parse_args(flags), torch.float32, CPU, tmp_path / "rows.jsonl")
    rows = rows_in(tmp_path / "rows.jsonl")
    assert capfd.readouterr().err.count("Traceback (most recent call last)") == len(RIVALS)
    told = "RuntimeError: python -m bench.rivals ended with 1: ... ImportError: no peft"
    assert [row["failed"] for row in rows if "failed" in row] == [told] * len(RIVALS)
    assert {row["dropout"] for row in rows if "tokens_per_s" in row} == {0.0, 0.1}


def test_verdicts_hold_the_rows_to_the_issue_s_numbers() -> None:
    def row(mode: str, n: int, dropout: float, rate: float, percent: float) -> dict[str, Any]:
        return {"mode": mode, "triples": n, "dropout": dropout, "tokens_per_s": rate, "limit_percent": percent}

    padded = row(f"transformers + PEFT: {RIVALS[0].name}", 64, 0.0, 2500.0, 0.0)
    rows = [row("ours bf16", 64, 0.0, 13_500.0, 70), row("ours bf16", 64, 0.1, 12_000.0, 65), padded]
    told = verdicts([*rows, row("ours bf16", 512, 0.0, 15_000.0, 84.9)])
    assert [(answer["question"], answer["verdict"]) for answer in told] == [
        ("bf16, 64 triples: tokens/s", "pass"),
        ("bf16, 64 triples: times transformers + PEFT, padded", "pass"),
        ("bf16, 64 triples: dropout 0.1 over dropout 0", "fail"),
        ("bf16, 512 triples, dropout 0.0: % of the limit", "fail"),
    ]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT", "gemm"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "gemm"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_s1688gemm_128x128>", "gemm"),
        ("_rms_norm_backward_kernel", "norm"),
        ("_varlen_attention_forward_kernel", "attention"),
        ("_rope_kernel", "rope"),
        ("_glu_backward_kernel", "swiglu"),
        ("_lora_linear_forward_kernel", "lora"),
        ("void at::native::(anonymous namespace)::CatArrayBatchedCopy<float, 2>", "concatenation"),
        ("void at::native::elementwise_kernel<128, 4, at::native::direct_copy_kernel_cuda(...)>", "copies"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float> >", "sums"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::exp_kernel_cuda(...)>", OTHER),
        ("aten::mm", "gemm"),
        ("e5kernels::rms_norm_forward", "norm"),
    ],
)
def test_kernels_are_told_apart_by_name(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_a_profile_sums_up_and_names_copies_that_should_not_be() -> None:
    strided = "void at::native::elementwise_kernel<128, 4, at::native::direct_copy_kernel_cuda()>"
    contiguous = "void at::native::vectorized_elementwise_kernel<4, at::native::direct_copy_kernel_cuda()>"
    parts = [Part("nvjet_a", 2, 3.0), Part(strided, 4, 0.5), Part(contiguous, 1, 0.5), Part("CatArrayBatched", 1, 0.5)]
    rows = bench.step_profile.rows_of(parts, [Part("lerp", 9, 0.5)], {"gemm": 2.5})
    kinds = {row["kind"]: row for row in rows if "kind" in row}
    assert kinds["gemm"] == {"kind": "gemm", "ms": 3.0, "calls": 2, "percent": 60.0, "floor_ms": 2.5}
    assert kinds["copies"]["ms"] == 1.0 and kinds[UPDATE]["calls"] == 9
    assert {row["unwanted"] for row in rows if "unwanted" in row} == {strided, "CatArrayBatched"}
    assert rows[-1] == {"unwanted_copies": 5}


def test_a_written_model_is_a_folder_that_our_tokenizer_reads(tmp_path: Path) -> None:
    write_model(tmp_path / "model", SIZES["tiny"], torch.bfloat16, CPU, ["one two three", "two three four"] * 20)
    tokenizer = Tokenizer.load(tmp_path / "model")
    (ids,), _ = tokenizer.encode_batch(["two three"], 16)
    assert ids[0] == 1 and ids[-1] == 2 and tokenizer.decode(ids[1:-1]) == "two three"
    assert MISTRAL.hidden_dim == 14336


@pytest.mark.parametrize("dry", [[], ["--dry", "--world-size", "3", "--strategy", "full"]])
def test_planned_memory_is_told_beside_what_was_allocated(dry: list[str], tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    command = ["backbone.dtype=float32", "--random", "tiny", "--tokens", "256", "--out", str(out), "--length", "64"]
    assert bench.plan.main([*command, "--recompute", "none", "block", *dry]) == 0
    rows = rows_in(out)
    assert [row["recompute"] for row in rows] == ["none", "block"]
    for row in rows:
        assert (row["bench"], row["dry"], row["ranks"]) == ("plan", bool(dry), 3 if dry else 1)
        assert row["predicted_mib"] > 0 and row["ratio"] == pytest.approx(1, abs=0.1)
    assert rows[0]["measured_mib"] > rows[1]["measured_mib"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tokens", "100"], "multiples of --length 128: got [100]"),
        (["--dry", "--strategy", "hybrid"], "--dry has no other rank to ask"),
        (["--world-size", "2"], "start real ranks by torchrun"),
    ],
)
def test_a_plan_s_bench_refuses_what_it_cannot_do(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        bench.plan.main(arguments)
    assert said in capsys.readouterr().err


@pytest.mark.slow  # five processes, 36 s
def test_the_real_entry_is_killed_resumed_and_exported(tmp_path: Path) -> None:
    flags = "--device cpu --size tiny --layers 1 --batch 8 --steps 8 --max-tokens 32 --micro-batch-tokens 256".split()
    files = ["--work", str(tmp_path), "--out", str(tmp_path / "rows.jsonl")]
    assert bench.full_size.main([*flags, *files]) == 0
    told = {row["what"]: row for row in rows_in(tmp_path / "rows.jsonl")}
    assert list(told) == ["model written", "killed", "resumed and done", "exported", "beside bench.train_step"]
    assert 4 <= told["killed"]["steps"] < 8 and told["resumed and done"]["steps"] == 8
    assert "adapter_model.safetensors" in told["exported"]["files"] and told["beside bench.train_step"]["ratio"] > 0
    assert not (tmp_path / "model").exists()
