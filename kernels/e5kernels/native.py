"""The compiled CPU ops of csrc/, where setup.py built them: `torch.ops.e5kernels.NAME`.

Importing this room loads the library. Without one (no compiler at installation) `AVAILABLE` is false and every op runs
by its reference, which its `face` says in the first log line; a library that is there and does not load is an error.
"""

from pathlib import Path

import torch
from torch import Tensor

_LIBRARIES = sorted(Path(__file__).parent.glob("_C*.so"))
AVAILABLE = bool(_LIBRARIES)
for _library in _LIBRARIES:
    torch.ops.load_library(_library)


def face(device: torch.device) -> str:
    """Name the face that ops of csrc/ use on a device: "c++" on the CPU where they are built, else "reference"."""
    return "c++" if AVAILABLE and device.type == "cpu" else "reference"


def takes(x: Tensor) -> bool:
    """Say whether the faces are written for this dtype: float32, bfloat16 and, on the CPU, float64."""
    return x.dtype in (torch.float32, torch.bfloat16) or (x.dtype == torch.float64 and x.device.type == "cpu")
