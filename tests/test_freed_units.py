"""Nothing reads a unit that is not gathered: with NaN in all that is freed, a sharded step is the whole model's."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from models import save_embedder
from nan_laws import poisoned_steps, steps
from ranks import free_port, run_ranks

from e5core.distributed import ALONE, World


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_embedder(tmp_path_factory.mktemp("embedder"), 4)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("world_size", [1, 2])
def test_freed_units_are_not_read(world_size: int, full: bool, embedder: Path) -> None:
    wanted = steps(ALONE, str(embedder), "none", full, torch.float64)
    arguments = (str(embedder), full, torch.float64)
    found = [poisoned_steps(ALONE, *arguments)] if world_size == 1 else run_ranks(2, poisoned_steps, *arguments)
    for got in found:
        assert got["n_filled"] > 20
        assert got["losses"] == pytest.approx(wanted["losses"], rel=1e-11)
        assert np.linalg.norm(got["trained"] - wanted["trained"]) < 1e-12 * np.linalg.norm(wanted["trained"])


@pytest.mark.gpu
@pytest.mark.parametrize("full", [False, True])
def test_freed_units_are_not_read_over_nccl(full: bool, embedder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank with a group of its own: gathers run on the side stream, and only events order them before products."""
    device = torch.device("cuda", 0)
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}.items():
        monkeypatch.setitem(os.environ, name, str(value))
    dist.init_process_group("nccl", rank=0, world_size=1, device_id=device)
    try:
        world = World(rank=0, world_size=1, device=device)
        wanted = steps(world, str(embedder), "none", full, torch.float32)
        got = poisoned_steps(world, str(embedder), full, torch.float32)
    finally:
        dist.destroy_process_group()
    assert got["n_filled"] > 20 and got["losses"] == pytest.approx(wanted["losses"], rel=1e-5)
    assert np.linalg.norm(got["trained"] - wanted["trained"]) < 2e-5 * np.linalg.norm(wanted["trained"])
