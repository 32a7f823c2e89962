"""A command's ranks end as they should: quietly when all is done, at once and with its reason where one failed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from models import save_embedder
from ranks import ROOT, free_port
from tiny_runs import CONFIG, SYNTHETIC

# Threads of gloo that outlive `finish` abort one process in ten, so they are looked for, by name.
ENDS = """
import importlib, sys
from pathlib import Path

code = importlib.import_module(f"e5core.{sys.argv[1]}").main(sys.argv[2:])
names = [file.read_text().strip() for file in Path("/proc/self/task").glob("*/comm")]
left = sorted(name for name in names if "gloo" in name)
print("left:", left, "dynamo:", "torch._dynamo" in sys.modules)
sys.exit(code)
"""


def ranks_of(n: int, code: str, *arguments: str, local_size: int) -> list[tuple[int, str, str]]:
    """Run a script in n ranks.  Returns exit status, stdout and stderr of each."""
    shared = {"WORLD_SIZE": n, "LOCAL_WORLD_SIZE": local_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    shared |= {"OMP_NUM_THREADS": 1, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    running = []
    for rank in range(n):
        own = {name: str(value) for name, value in (shared | {"RANK": rank, "LOCAL_RANK": rank}).items()}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        command = [sys.executable, "-c", code, *arguments]
        running.append(subprocess.Popen(command, env=os.environ | own, cwd=ROOT, **pipes))
    try:
        said = [process.communicate(timeout=120) for process in running]
    finally:
        for process in running:
            process.kill()
    return [(process.returncode, *pair) for process, pair in zip(running, said, strict=True)]


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exit")
    text = CONFIG.format(run=folder / "run", model=save_embedder(folder / "model"), data=SYNTHETIC / "en_sts.jsonl")
    (folder / "config.toml").write_text(text)
    (folder / "texts.jsonl").write_text('{"text": "the tram is late"}\n' * 5)
    return folder / "config.toml"


def test_no_thread_of_a_group_outlives_a_command(config_file: Path, tmp_path: Path) -> None:
    """By strategy none, full, and on two nodes of two ranks hybrid, which makes groups of its own."""
    run = f"train.run={tmp_path / 'run'}"
    texts = ["--input", str(config_file.parent / "texts.jsonl"), "--output", str(tmp_path / "vectors.npy")]
    commands = [
        (2, ["verify_grad", str(config_file), "sharding.strategy=full"]),
        (2, ["train", str(config_file), run, "train.steps=1"]),
        (4, ["encode", str(tmp_path / "run"), *texts, "--strategy", "hybrid"]),
    ]
    for n, arguments in commands:
        for status, output, errors in ranks_of(n, ENDS, *arguments, local_size=2):
            assert status == 0, errors
            assert output.splitlines()[-1] == "left: [] dynamo: True"
