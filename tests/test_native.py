"""The compiled ops are used where they are built, replaced in the open where not, and never when they are damaged."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from faces import DEVICE

from e5kernels import attention, dropout, native, rms_norm, rope, swiglu

PACKAGE = Path(native.__file__).parent
LIBRARY = "_C.abi3.so"
ROOMS = [attention, dropout, rms_norm, rope, swiglu]
OPS = ["varlen_attention_forward", "rms_norm_forward", "glu_forward", "rope", "keyed_dropout"]

# Run with the package as it is and with a copy that has no library: both must give the same numbers.
PROGRAM = """
import json
import torch
from e5kernels import attention, dropout, native, rms_norm, rope, swiglu

rooms = (attention, dropout, rms_norm, rope, swiglu)
x = torch.linspace(-2, 3, 5 * 4 * 6, dtype=torch.float64).sin().reshape(5, 4, 6).requires_grad_()
bounds = torch.tensor([0, 2, 5], dtype=torch.int32)
table = torch.linspace(0, 1, 15, dtype=torch.float64).reshape(5, 1, 3)
outs = [
    attention.varlen_attention(x, x[:, :2], x[:, 2:], bounds, scale=0.4, window=2),
    rms_norm.rms_norm(x, table.flatten()[:6].detach(), 1e-5),
    rope.rope(x, table.cos(), table.sin()),
    swiglu.swiglu(x, x.flip(0)),
    swiglu.geglu(x, x.flip(0)),
]
(gradient,) = torch.autograd.grad(sum((out**2).sum() for out in outs), x)
outs += [gradient, dropout.keyed_dropout(x.detach().flatten(1), torch.arange(5), 7, 77)]
numbers = torch.cat([out.detach().flatten() for out in outs]).tolist()
faces = sorted({room.face(torch.device("cpu")) for room in rooms})
print(json.dumps({"faces": faces, "available": native.AVAILABLE, "numbers": numbers}))
"""


def run(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the program with the package that lies in a folder."""
    environment = os.environ | {"PYTHONPATH": str(folder)}
    command = [sys.executable, "-c", PROGRAM]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=120)


@pytest.fixture
def without_library(tmp_path: Path) -> Path:
    """A folder with a copy of the package, the library left out."""
    shutil.copytree(PACKAGE, tmp_path / "e5kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return tmp_path


def test_the_face_is_the_library_s_where_there_is_one() -> None:
    built = any(path.suffix == ".so" for path in PACKAGE.iterdir())
    assert built == native.AVAILABLE
    assert all(hasattr(torch.ops.e5kernels, op) == built for op in OPS)
    for room in ROOMS:
        assert room.face(torch.device("cpu")) == ("c++" if built else "reference")
        assert room.face(torch.device("mps")) == "reference"
        on_cuda = "triton" if sys.platform == "linux" else "reference"
        assert room.face(torch.device("cuda", 0)) == on_cuda


def test_triton_s_face_where_it_is_chosen_computes_what_the_reference_does(monkeypatch: pytest.MonkeyPatch) -> None:
    if sys.platform != "linux":
        pytest.skip("Triton is published for Linux only")
    x, table = torch.randn(5, 4, 6, device=DEVICE), torch.rand(5, 1, 3, device=DEVICE)
    keys, weight = torch.arange(5, device=DEVICE), torch.randn(6, device=DEVICE)
    packed, settings = (x, x[:, :2], x[:, 2:], torch.tensor([0, 1, 5]).int().to(DEVICE)), {"scale": 0.4, "window": 2}
    calls = [
        (attention, attention.varlen_attention, attention.varlen_attention_reference, packed, settings),
        (rms_norm, rms_norm.rms_norm, rms_norm.rms_norm_reference, (x, weight.requires_grad_(), 1e-5)),
        (rms_norm, rms_norm.add_rms_norm, rms_norm.add_rms_norm_reference, (x, x.flip(0), weight, 1e-5)),
        (rope, rope.rope, rope.rope_reference, (x, table.cos(), table.sin())),
        (swiglu, swiglu.swiglu, swiglu.swiglu_reference, (x, x.flip(0))),
        (swiglu, swiglu.geglu, swiglu.geglu_reference, (x, x.flip(0))),
        (dropout, dropout.keyed_dropout, dropout.keyed_dropout_reference, (x.flatten(1), keys, 2**64 - 5, 77)),
    ]
    for room, op, reference, arguments, *keywords in calls:
        named = dict(*keywords)
        expected = reference(*arguments, **named)
        with monkeypatch.context() as patch:
            patch.setattr(room, "face", lambda device: "triton")
            patch.setattr(room, reference.__name__, None)
            torch.testing.assert_close(op(*arguments, **named), expected)
    for dtype in (torch.float16, torch.float64):
        assert not native.takes(torch.empty(0, dtype=dtype, device="meta")), "off the CPU there are fp32 and bf16 alone"


def test_without_a_library_the_reference_gives_the_same_numbers(without_library: Path) -> None:
    copy, whole = run(without_library), run(PACKAGE.parent)
    assert copy.returncode == whole.returncode == 0, copy.stderr + whole.stderr
    copy, whole = json.loads(copy.stdout), json.loads(whole.stdout)
    assert copy["faces"] == ["reference"] and copy["available"] is False
    assert whole["faces"] == (["c++"] if native.AVAILABLE else ["reference"])
    assert len(copy["numbers"]) > 600 and copy["numbers"] == pytest.approx(whole["numbers"], rel=1e-11, abs=1e-13)


def test_a_damaged_library_is_an_error_and_no_silent_fallback(without_library: Path) -> None:
    (without_library / "e5kernels" / LIBRARY).write_bytes(b"\x7fELF, and then nothing that a loader could use")
    done = run(without_library)
    assert done.returncode != 0 and not done.stdout
    assert "OSError" in done.stderr and LIBRARY in done.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_dtypes_that_the_ops_are_written_for_are_named(dtype: torch.dtype) -> None:
    assert native.takes(torch.empty(0, dtype=dtype))
    assert not any(native.takes(torch.empty(0, dtype=other)) for other in (torch.float16, torch.int32, torch.complex64))
