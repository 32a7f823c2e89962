"""A command's ranks end as they should: quietly when all is done, at once and with its reason where one failed."""

import os
import subprocess
import sys
import time
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
    """With slices of the model, and on two nodes of two ranks hybrid, which makes groups of its own."""
    texts = ["--input", str(config_file.parent / "texts.jsonl"), "--output", str(tmp_path / "vectors.npy")]
    commands = [
        (2, ["verify_grad", str(config_file), "sharding.strategy=full"]),
        (4, ["encode", str(config_file.parent / "model"), *texts, "--strategy", "hybrid"]),
    ]
    for n, arguments in commands:
        for status, output, errors in ranks_of(n, ENDS, *arguments, local_size=2):
            assert status == 0, errors
            assert output.splitlines()[-1] == "left: [] dynamo: True"


RAISES = """
import os, sys, time
import e5core.backbone, e5core.train

n_calls, whole = 0, e5core.backbone.Block.forward

def forward(*arguments):
    global n_calls
    n_calls += 1
    if n_calls == 4 and os.environ["RANK"] == "1":
        print("moment", time.time(), file=sys.stderr, flush=True)
        raise RuntimeError("the tram is late")
    return whole(*arguments)

e5core.backbone.Block.forward = forward
sys.exit(e5core.train.main(sys.argv[1:]))
"""


def test_a_rank_that_raises_ends_those_that_wait_for_its_slice(config_file: Path, tmp_path: Path) -> None:
    (tmp_path / "raises.py").write_text(RAISES)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(tmp_path / "raises.py"), str(config_file), "sharding.strategy=full"]
    command += [f"train.run={tmp_path / 'run'}"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120)
    ended = time.time()
    assert done.returncode == 1 and "RuntimeError: the tram is late" in done.stderr, done.stderr
    moment = next(line for line in done.stderr.splitlines() if line.startswith("moment"))
    assert ended - float(moment.split()[1]) < 20


HANGS = """
import os, time
from datetime import timedelta
from e5core import distributed

distributed.GIVE_UP_AFTER = timedelta(seconds=2)
world = distributed.start()
distributed.share(0, world)
if not world.is_main:
    time.sleep(6)
    os._exit(0)
began = time.monotonic()
try:
    distributed.share(0, world)
except RuntimeError as error:
    print(time.monotonic() - began, str(error).partition(chr(10))[0], flush=True)
os._exit(0)
"""


def test_a_rank_that_hangs_is_given_up() -> None:
    """The same call under a limit of seconds; `start` gives it to gloo and NCCL alike."""
    (_, output, errors), _ = ranks_of(2, HANGS, local_size=2)
    seconds, _, said = output.partition(" ")
    assert 1 < float(seconds) < 5 and "Timed out waiting" in said, output + errors
