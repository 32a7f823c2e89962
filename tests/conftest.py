"""What every test needs: a seed and, where there is no GPU, Triton's interpreter and a reason for what is skipped."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    # triton.jit reads this when a kernel is defined, so it must stand before any test imports one
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked gpu where there is none, with a reason that pytest -rs prints beside each name."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
