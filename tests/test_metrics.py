"""metrics.jsonl: whole lines, valid JSON, exact after a resume. Progress and ranks: the same figures in both forms."""

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from e5core import distributed
from e5core.metrics import MetricsFile, Progress

STEP = {"loss": 1.25, "lr": 5e-4, "grad_norm": 0.5, "tokens_per_s": 1234.0, "in_batch_accuracy": 0.75}
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
PROGRAM = f"""
from e5core.metrics import Progress
with Progress(4, 2) as progress:
    for step in (1, 2, 3, 4):
        progress.step({{"step": step, **{STEP!r}}})
"""


def written(path: Path) -> list[dict[str, object]]:
    text = path.read_text(encoding="utf-8")
    assert text == "" or text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def write_steps(path: Path, resume_step: int | None, *steps: int, **more: object) -> None:
    file = MetricsFile(path, resume_step)
    for step in steps:
        file.write({"step": step, "loss": step / 8, **more})
    file.close()


def test_every_step_is_one_line_on_disk_at_once(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl", None)
    for step in (1, 2):
        file.write({"step": step, "loss": 0.5, "eval": {"sts": 1.0}, "note": "é\n"})
        assert len(written(tmp_path / "metrics.jsonl")) == step
    file.close()
    assert written(tmp_path / "metrics.jsonl")[1] == {"step": 2, "loss": 0.5, "eval": {"sts": 1.0}, "note": "é\n"}


def test_resumed_file_equals_the_one_of_a_run_never_stopped(tmp_path: Path) -> None:
    write_steps(tmp_path / "whole.jsonl", None, 1, 2, 3, 4, 5)
    write_steps(tmp_path / "resumed.jsonl", None, 1, 2, 3, 4)
    write_steps(tmp_path / "resumed.jsonl", 2, 3, 4, 5)
    assert (tmp_path / "resumed.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["resumed.jsonl", "whole.jsonl"]


def test_torn_last_line_is_cut_on_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, None, 1, 2)
    with open(path, "ab") as file:
        file.write('{"step": 3, "note": "é'.encode()[:-1])
    write_steps(path, 3, 4)
    assert [line["step"] for line in written(path)] == [1, 2, 4]


def test_new_run_starts_an_empty_file_and_resume_without_a_file_too(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, 7, 8)
    assert [line["step"] for line in written(path)] == [8]
    write_steps(path, None)
    assert written(path) == []


@pytest.mark.parametrize("line, said", [("{oops", "is not JSON"), ('{"loss": 1}', "integer step"), ("[1]", "object")])
def test_damaged_line_is_named_by_file_and_number_and_kept(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    before = path.read_bytes()
    with pytest.raises(ValueError, match=f"metrics.jsonl:2 .*{said}"):
        MetricsFile(path, 2)
    assert path.read_bytes() == before


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_metric_is_refused_by_name_and_writes_nothing(tmp_path: Path, bad: float) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl", None)
    for metrics, key in (({"loss": bad}, "loss"), ({"eval": {"sts": bad}}, "eval.sts"), ({"q": [0.0, bad]}, r"q\[1\]")):
        with pytest.raises(ValueError, match=f"metric {key} must be finite"):
            file.write({"step": 1, **metrics})
    file.close()
    assert written(tmp_path / "metrics.jsonl") == []


@pytest.mark.parametrize("step", [{}, {"step": 1.0}, {"step": True}, {"step": -1}])
def test_line_without_an_integer_step_is_refused(tmp_path: Path, step: dict[str, object]) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl", None)
    with pytest.raises(ValueError, match="integer step"):
        file.write(step)
    file.close()


def test_plain_progress_is_a_line_every_log_every_steps_and_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(7, 3) as progress:
        for step in range(1, 8):
            progress.step({"step": step, **STEP, "ignored": 3})
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == ["3/7", "6/7", "7/7"]
    figures = "loss 1.2500 lr 5.00e-04 grad_norm 0.500 tokens_per_s 1,234 in_batch_accuracy 0.750"
    assert lines[-1] == f"step 7/7 {figures} eta 0:00:00"


def test_eta_of_a_resumed_run_counts_its_own_steps_only(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Progress(1000, 1) as progress:
        now = progress.started_s + 20.0
        monkeypatch.setattr("time.monotonic", lambda: now)
        progress.step({"step": 901, **STEP})
        progress.step({"step": 902, **STEP})
    etas = [line.split()[-1] for line in capsys.readouterr().err.splitlines()]
    assert etas == ["0:33:00", "0:16:20"]  # 99 steps at 20 s, then 98 at 10 s


def test_terminal_shows_a_bar_with_the_figures_of_the_plain_line() -> None:
    plain = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True).stderr
    shown_plain = plain.splitlines()[-1].split()
    main, terminal = pty.openpty()
    environment = {**os.environ, "COLUMNS": "80", "TERM": "xterm"}
    child = subprocess.Popen([sys.executable, "-c", PROGRAM], stderr=terminal, env=environment)
    os.close(terminal)
    raw = b""
    while chunk := _read(main):
        raw += chunk
    assert child.wait() == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", raw.decode())
    last = [word for word in text[text.rindex("step 4/4") :].split() if not set(word) <= set("━╸╺")]
    assert last == shown_plain


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:  # Linux's answer when the other end of a pseudo-terminal is closed
        return b""


def test_progress_refuses_missing_figures_and_counts_below_one() -> None:
    with Progress(4, 1) as progress, pytest.raises(ValueError, match="got no step, lr"):
        progress.step({key: value for key, value in STEP.items() if key != "lr"})
    for total_steps, log_every in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            Progress(total_steps, log_every)


def test_world_without_torchrun_is_one_main_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in RANK_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    world = distributed.start()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    assert (world.rank, world.world_size, world.device, world.is_main) == (0, 1, device, True)


@pytest.mark.parametrize(
    "name, value, said",
    [
        ("WORLD_SIZE", "2", "got WORLD_SIZE=2 but no MASTER_ADDR: start the job with torchrun"),
        ("WORLD_SIZE", "two", "WORLD_SIZE must be an integer: got 'two'"),
        ("RANK", "1", "RANK must be in 0..0, for WORLD_SIZE=1: got RANK=1"),
    ],
)
def test_ranks_without_torchrun_are_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str
) -> None:
    for other in (*RANK_VARIABLES, "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=said):
        distributed.start()


def test_only_rank_zero_logs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        distributed.log(f"from {rank}")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "from 0\n")


def test_every_rank_says_why_it_ends(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in RANK_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    distributed.log_error("late")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    distributed.log_error("late")
    assert capsys.readouterr().err == "late\nrank 1: late\n"
