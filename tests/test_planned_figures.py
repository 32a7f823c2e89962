"""The figures that pages call planned are what the plan says today; those of configs: tests/test_shipped_configs.py."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from scoring import ROOT

from bench.models import MISTRAL, write_config
from e5core.plan import main

SCALING, PAPER_RUN, README = (
    (ROOT / page).read_text(encoding="utf-8") for page in ("docs/scaling.md", "docs/paper_run.md", "README.md")
)
COMMAND = re.search(r"-m e5core\.plan (.*?) --gpu ", SCALING, re.DOTALL)[1].replace("\\\n", " ").split()
OPTIONS = {"H100 80 GB": "--gpu h100", "A100 80 GB": "--gpu a100-80", "RTX 4090 24 GB": "--gpu rtx4090"}
Planned = Callable[[str], str]


def rows() -> list[tuple[str, list[str]]]:
    """The rows of docs/scaling.md as (options, the cells behind them); "..." is the last row without it."""
    found, whole = [], ""
    for options, rest in re.findall(r"^\| [^|]* \| `([^`|]*--[^`|]*)` \| (.*) \|$", SCALING, re.MULTILINE):
        whole = whole if options.startswith("... ") else options
        found.append((options.replace("...", whole), rest.split(" | ")))
    return found


ROWS = rows()


@pytest.fixture
def planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Planned:
    """Give what the pages' command says with options, where Mistral-7B's config.json is all there is."""
    monkeypatch.chdir(ROOT)
    write_config(tmp_path, MISTRAL, torch.bfloat16)

    def run(options: str) -> str:
        assert main([*COMMAND, f"backbone.path={tmp_path}", *options.split()]) == 0
        return capsys.readouterr().out

    return run


def hours(said: str) -> list[str]:
    return list(re.search(r"([\d,.]+)  h with gathering hidden, ([\d,.]+) h with", said).groups())


@pytest.mark.parametrize(("options", "cells"), ROWS, ids=[options for options, _ in ROWS])
def test_the_tables_of_scaling_are_what_the_plan_says(options: str, cells: list[str], planned: Planned) -> None:
    said = planned(options)
    strategy, tokens, policy = re.search(
        r"strategy = (\w+)  micro_batch_tokens = (\d+)  recompute = (\w+)", said
    ).groups()
    setting, *figures = cells
    assert re.sub(r"one pass of | tokens|recompute ", "", setting).removeprefix(f"{strategy}, ") == (
        f"{int(tokens):,}, {policy}"
    )
    assert "one pass" not in setting or "of a step of 1 micro-batches" in said
    peaks = re.findall(r"([\d,.]+)  (?:peak of torch's allocator|with what the framework keeps)", said)
    assert figures in (hours(said), peaks)


def test_no_row_is_passed_over() -> None:
    assert len(ROWS) == SCALING.count("--gpu ") - 1 + SCALING.count("`... ")
    assert {len(figures) for _, (_, *figures) in ROWS} == {2}


def test_the_hours_of_the_paper_s_run_are_what_the_plan_says(planned: Planned) -> None:
    found = re.findall(r"^\| (\d+) ([^|]*) \| ([\d.]+) \|$", PAPER_RUN, re.MULTILINE)
    assert len(found) == 5
    for n, card, shown in found:
        least = float(hours(planned(f"{OPTIONS[card]} --world-size {n}"))[0])
        assert f"{least:.{len(shown.partition('.')[2])}f}" == shown


def test_what_pages_say_of_a_card_s_config_is_what_its_head_says() -> None:
    found = re.findall(r"(configs/e5_mistral_7b_\w+\.toml) \| ([\d,]+)(?:, recompute \w+)? \| ([\d,]+) \|", README)
    assert len(found) == len(list((ROOT / "configs").glob("e5_mistral_7b_*.toml")))
    for name, tokens, peak in found:
        text = (ROOT / name).read_text(encoding="utf-8")
        assert f"Needs {peak} MiB" in text and f"micro_batch_tokens = {tokens.replace(',', '')}\n" in text
    [(_, tokens, peak)] = [row for row in found if row[0].endswith("_24gb.toml")]
    assert f"one of 24 GB: {peak} MiB with micro-batches of {tokens} tokens" in PAPER_RUN.replace("\n", " ")
