"""The heads of .gguf files: what is read is what the gguf package reads, and what is damaged is named."""

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from e5core.gguf_file import read_gguf_header, read_gguf_metadata

KINDS = gguf.GGMLQuantizationType


def write(path: Path, alignment: int | None = None) -> None:
    """Write a file with a value of every kind that there is and tensors of several shapes and types."""
    writer = gguf.GGUFWriter(path, "llama")
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    for kind, value in {
        "uint8": 200, "int8": -3, "uint16": 2**16 - 1, "int16": -5, "uint32": 2**32 - 1, "int32": -7,
        "uint64": 2**64 - 1, "int64": -(2**63), "float32": 0.25, "float64": 1e300, "bool": True, "string": "é\n",
    }.items():  # fmt: skip
        writer.add_key_value(f"a.{kind}", value, gguf.GGUFValueType[kind.upper()])
    writer.add_array("b.strings", ["", "two words", "▁"])
    writer.add_array("b.numbers", [1, -2, 3])
    writer.add_array("b.floats", [0.5, -1.5])
    random = np.random.default_rng(0)
    for name, shape, kind in (
        ("row", (7,), KINDS.F32), ("odd", (3, 5), KINDS.F16), ("deep", (2, 3, 64), KINDS.Q8_0),
        ("blocks", (3, 32), KINDS.Q4_1), ("brain", (1, 9), KINDS.BF16),
    ):  # fmt: skip
        values = random.standard_normal(shape).astype(np.float32)
        writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("alignment", [None, 4096])
def test_metadata_and_tensors_equal_the_gguf_packages_reading(alignment: int | None, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write(path, alignment)
    metadata, tensors = read_gguf_header(path)
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert metadata == fields and metadata["a.uint64"] == 2**64 - 1
    assert list(tensors) == [tensor.name for tensor in reader.tensors]
    for peer in reader.tensors:
        got = tensors[peer.name]
        assert got.name == peer.name
        assert (got.ggml_type, got.offset) == (peer.tensor_type, peer.data_offset)
        assert got.shape == tuple(reversed(peer.shape.tolist()))


def test_metadata_can_be_asked_for_by_prefix(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf")
    metadata = read_gguf_metadata(tmp_path / "m.gguf", "b.")
    assert metadata == {"b.strings": ["", "two words", "▁"], "b.numbers": [1, -2, 3], "b.floats": [0.5, -1.5]}


def _text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def _file(*, entries: tuple[bytes, ...] = (), tensors: tuple[bytes, ...] = (), **counts: int) -> bytes:
    numbers = {"version": 3, "n_tensors": len(tensors), "n_keys": len(entries)} | counts
    return struct.pack("<4sIQQ", b"GGUF", *numbers.values()) + b"".join((*entries, *tensors))


ONE = _text("a") + struct.pack("<II", 4, 1)  # a uint32
TENSOR = _text("t") + struct.pack("<IQIQ", 1, 2, 0, 0)  # two F32
NESTED = struct.pack("<IQ", 9, 1) * 9999  # arrays of one array each
ALIGNMENT = _text("general.alignment")
DAMAGED = {
    "empty": (b"", "cannot mmap an empty file"),
    "another kind": (b"GGML" + bytes(60), "begins with b'GGML' version 0"),
    "version 1": (_file(version=1), "begins with b'GGUF' version 1"),
    "the other byte order": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version 50331648"),
    "too many keys": (_file(entries=(ONE,), n_keys=2**64 - 1), "it ends at byte 41"),
    "too many tensors": (_file(tensors=(TENSOR,), n_tensors=2**64 - 1), "it ends at byte 57"),
    "too many dimensions": (_file(tensors=(_text("t") + struct.pack("<I", 2**32 - 1) + bytes(99),)), "it ends"),
    "endless key": (_file(entries=(struct.pack("<Q", 2**64 - 1),)), "."),
    "key that is no text": (_file(entries=(struct.pack("<Q", 1) + b"\xff" + ONE[9:],)), "can't decode byte 0xff"),
    "unknown kind": (_file(entries=(_text("a") + struct.pack("<I", 13),)), "unknown value type 13 at byte 37"),
    "endless array": (_file(entries=(_text("a") + struct.pack("<IIQ", 9, 12, 2**62),)), "."),
    "endless strings": (_file(entries=(_text("a") + struct.pack("<IIQ", 9, 8, 2**62),)), "it ends"),
    "nested arrays": (_file(entries=(_text("a") + struct.pack("<I", 9) + NESTED,)), "an array of arrays"),
    "a key twice": (_file(entries=(ONE, ONE)), "it holds 'a' twice"),
    "a tensor twice": (_file(tensors=(TENSOR, TENSOR)), "it holds 't' twice"),
    "alignment 0": (_file(entries=(ALIGNMENT + struct.pack("<II", 4, 0),)), "a power of two, got 0"),
    "alignment 24": (_file(entries=(ALIGNMENT + struct.pack("<II", 4, 24),)), "a power of two, got 24"),
    "alignment a text": (_file(entries=(ALIGNMENT + struct.pack("<I", 8) + _text("32"),)), "a power of two, got '32'"),
    "alignment true": (_file(entries=(ALIGNMENT + struct.pack("<I?", 7, True),)), "a power of two, got True"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_heads_are_named(case: str, tmp_path: Path) -> None:
    content, message = DAMAGED[case]
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"cannot read the metadata of .*m.gguf: .*{message}.*; copy the file again"):
        read_gguf_header(path)


def test_a_head_cut_off_at_any_byte_is_named(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf")
    whole: dict[str, Any] = read_gguf_header(tmp_path / "m.gguf")[1]
    data, cut = (tmp_path / "m.gguf").read_bytes(), tmp_path / "cut.gguf"
    end = data.index(b"brain") + len("brain") + struct.calcsize("<IQQIQ")  # of the last tensor's description
    assert end <= min(tensor.offset for tensor in whole.values())
    for size in range(end):
        cut.write_bytes(data[:size])
        with pytest.raises(ValueError, match="cannot read the metadata of .*cut.gguf"):
            read_gguf_header(cut)
    cut.write_bytes(data[:end])
    assert read_gguf_header(cut)[1] == whole
