"""Tensors on disk in stretches: each rank writes what it holds of them, and any number of ranks reads it again.

A file holds stretches of tensors, laid flat, in safetensors' format; its metadata says of each where it begins in the
whole and what shape that has. The files of all ranks together hold every tensor whole. Moments of the optimizer are
kept so, and weights where all of them are trained (checkpoint.py).
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from e5core.sharding import Slice


class _Place(NamedTuple):
    file: Path
    start: int
    length: int


def write_stretches(path: Path, slices: Mapping[str, Slice]) -> Path:
    """Write what one rank holds.  Returns the file."""
    held = {name: part for name, part in slices.items() if len(part.values)}
    places = {name: json.dumps([part.start, *part.shape]) for name, part in held.items()}
    save_file({name: part.values for name, part in held.items()}, path, metadata=places)
    return path


class Stretches:
    """The files that ranks wrote, as one set of whole tensors."""

    def __init__(self, files: Iterable[Path]) -> None:
        """Read where everything lies.  Raises ValueError for a damaged file, or for two shapes of one tensor."""
        self.shapes: dict[str, tuple[int, ...]] = {}  # of the whole tensors, by name
        self._places: dict[str, list[_Place]] = {}
        for file in sorted(files):
            try:
                with safe_open(file, framework="pt") as source:
                    for name, place in sorted((source.metadata() or {}).items()):  # which come in any order
                        start, *shape = json.loads(place)
                        if self.shapes.setdefault(name, tuple(shape)) != tuple(shape):
                            raise ValueError(f"{file}: {name} has the shape {shape}, {self.shapes[name]} in another")
                        (length,) = source.get_slice(name).get_shape()
                        self._places.setdefault(name, []).append(_Place(file, start, length))
            except SafetensorError as error:
                raise ValueError(f"{file}: not a whole safetensors file ({error})") from error

    @torch.no_grad()
    def fill(self, name: str, into: Slice) -> bool:
        """Fill a stretch of a tensor.  Returns whether all of it was there, of a tensor of this shape."""
        if self.shapes.get(name, into.shape) != into.shape:
            return False
        reached = into.start
        for place in sorted(self._places.get(name, []), key=lambda place: place.start):
            first, last = max(place.start, reached), min(place.start + place.length, into.stop)
            if first == reached and first < last:
                with safe_open(place.file, framework="pt") as source:
                    values = source.get_slice(name)[first - place.start : last - place.start]
                into.values[first - into.start : last - into.start] = values
                reached = last
        return reached >= into.stop

    def whole(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, whole tensor, fp32 or fp64), one in memory at a time.  Raises ValueError where a part lacks."""
        for name, shape in self.shapes.items():
            file = self._places[name][0].file
            with safe_open(file, framework="pt") as source:
                dtype = source.get_slice(name)[:0].dtype
            tensor = torch.empty(math.prod(shape), dtype=dtype)
            if not self.fill(name, Slice(tensor, 0, shape)):
                raise ValueError(f"{file.parent}: a part of {name} is missing; copy the folder again")
            yield name, tensor.view(shape)
