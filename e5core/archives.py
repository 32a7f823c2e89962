"""Files as bytes, however they are compressed: plain, .gz, or .zst where Python 3.14 or `zstandard` can read it.

A .zst frame that was cut off is an error here, as in gzip: `zstandard` itself would end it without a word.
"""

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import BinaryIO

SUFFIXES = (".gz", ".zst")
CHUNK_BYTES = 1 << 20


class DamagedArchive(ValueError):
    """A compressed file that does not decompress to its end; the message is the cause."""


@contextmanager
def open_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file to read its decompressed bytes; whatever reads it does so inside the `with`.

    Raises OSError; ValueError for a .zst file that nothing here can read; DamagedArchive from within the `with`.
    """
    if path.suffix == ".gz":
        try:
            with gzip.open(path, "rb") as file:
                yield file
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DamagedArchive(f"damaged gzip archive ({error})") from error
    elif path.suffix == ".zst":
        zstd = _zstd(path)
        try:
            with path.open("rb") as packed, io.BufferedReader(_Frames(packed, zstd), CHUNK_BYTES) as file:
                yield file
        except (EOFError, zstd.ZstdError) as error:
            raise DamagedArchive(f"damaged zstd archive ({error})") from error
    else:
        with path.open("rb") as file:
            yield file


def plain_name(path: Path) -> str:
    """Return a file's name without the ending of its compression."""
    return path.stem if path.suffix in SUFFIXES else path.name


def _zstd(path: Path) -> ModuleType:
    for name in ("compression", "zstandard"):
        if find_spec(name) is not None:
            return import_module("compression.zstd" if name == "compression" else name)
    raise ValueError(f"{path}: .zst needs Python 3.14 or `pip install zstandard`; or decompress the file")


class _Frames(io.RawIOBase):
    """The decompressed bytes of a file's Zstandard frames, one frame after another."""

    def __init__(self, packed: BinaryIO, zstd: ModuleType) -> None:
        self._packed = packed
        own = zstd.__name__ == "zstandard"
        self._new_frame = zstd.ZstdDecompressor().decompressobj if own else zstd.ZstdDecompressor
        self._frame = self._new_frame()
        self._begun = False  # whether the frame has had bytes
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        while not self._ready:
            if self._frame.eof:
                rest, self._frame, self._begun = self._frame.unused_data, self._new_frame(), False
            else:
                rest = b""
            packed = rest or self._packed.read(CHUNK_BYTES)
            if not packed:
                if self._begun:
                    raise EOFError("the file ends inside a frame")
                return 0
            self._begun = True
            self._ready = self._frame.decompress(packed)
        n_bytes = min(len(buffer), len(self._ready))
        buffer[:n_bytes], self._ready = self._ready[:n_bytes], self._ready[n_bytes:]
        return n_bytes
