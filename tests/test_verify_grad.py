"""The command that holds a user's split step against the whole one: it passes what is right and sees what is not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from models import save_embedder
from tiny_runs import CONFIG, ROOT, SYNTHETIC

from e5core.verify_grad import main

FAULTY = """
import sys
import e5core.step, e5core.verify_grad

split = []

def sum_gradients(parameters, world):  # of the split step alone, which comes first
    for p in parameters:
        if not split and p.grad is not None:
            p.grad.mul_({factor})
    split.append(world)

if {factor} != 1:
    e5core.step.sum_gradients = sum_gradients
sys.exit(e5core.verify_grad.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    text = CONFIG.format(run=folder / "run", model=save_embedder(folder / "model"), data=SYNTHETIC / "en_sts.jsonl")
    file = folder / "config.toml"
    file.write_text(text + "\n[loss]\ntemperature = 0.5\n")
    return file


def verify(tmp_path: Path, n: int, factor: float, *arguments: str) -> subprocess.CompletedProcess[str]:
    script = tmp_path / "faulty.py"
    script.write_text(FAULTY.format(factor=factor))
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n), str(script)]
    return subprocess.run(
        [*command, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=240
    )


def figures(output: str) -> dict[str, float]:
    lines = [line.split() for line in output.splitlines()]
    return {line[0]: float(line[1].rstrip(",")) for line in lines if line[0] in ("loss", "scale", "cosine")}


@pytest.mark.parametrize("strategy", ["none", "full"])
def test_two_ranks_in_small_micro_batches_with_recompute_have_the_gradient_of_the_whole_batch(
    strategy: str, config_file: Path, tmp_path: Path
) -> None:
    changes = ["batch.micro_batch_tokens=100", 'batch.recompute="block"', f'sharding.strategy="{strategy}"']
    done = verify(tmp_path, 2, 1, str(config_file), *changes)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "passed", done.stdout + done.stderr
    found = figures(done.stdout)
    assert found["scale"] == pytest.approx(1, abs=1e-5) and found["cosine"] == pytest.approx(1, abs=1e-8)
    assert not (config_file.parent / "run").exists()


def test_a_gradient_that_was_never_summed_or_is_scaled_is_reported(config_file: Path, tmp_path: Path) -> None:
    done = verify(tmp_path, 1, 0.25, str(config_file))
    assert done.returncode == 1, done.stderr
    assert figures(done.stdout)["scale"] == pytest.approx(0.25, abs=1e-5)
    assert "FAILED" in done.stdout


def test_bad_input_is_said(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(config_file), "batch.sizes=4"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("e5core.verify_grad:") and "batch.size" in said
