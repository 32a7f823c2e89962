"""TensorBoard's event files, written by hand: TFRecords, each an Event of scalars in protocol buffers' wire format.

A record is its length (uint64, little-endian), the masked CRC-32C of these eight bytes, its bytes, and their masked
CRC-32C. Of tensorflow/core/util/event.proto an Event has wall_time (1), step (2), file_version (3), summary (5); of
summary.proto a Summary has values (1), each with tag (1) and simple_value (2).
"""

import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

CRC32C = 0x82F63B78  # Castagnoli's polynomial, its bits reversed
MASK = 0xA282EAD8


def write_events(path: Path, steps: Iterable[tuple[float, int, Mapping[str, float]]]) -> None:
    """Write an event file, whole or not at all.

    path: TensorBoard takes a file for its own by "tfevents" in the name.
    steps: wall time in seconds since 1970, step, and the step's scalars by their tags.
    """
    temporary = path.with_name(".partial_events")  # no tfevents in it: TensorBoard may be looking
    try:
        with open(temporary, "wb") as file:
            file.write(_record(_field(3, b"brain.Event:2")))
            for wall_s, step, scalars in steps:
                values = b"".join(
                    _field(1, _field(1, tag.encode()) + b"\x15" + struct.pack("<f", value))
                    for tag, value in scalars.items()
                )
                time_and_step = b"\x09" + struct.pack("<d", wall_s) + b"\x10" + _varint(step)
                file.write(_record(time_and_step + _field(5, values)))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _field(number: int, content: bytes) -> bytes:
    """Encode a field of bytes, text or another message."""
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    """Encode an integer >= 0, seven bits a byte, the lowest first."""
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])


def _record(content: bytes) -> bytes:
    length = struct.pack("<Q", len(content))
    return length + _masked_crc(length) + content + _masked_crc(content)


def _masked_crc(content: bytes) -> bytes:
    crc = 0xFFFFFFFF
    for byte in content:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ CRC32C * (crc & 1)
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + MASK) & 0xFFFFFFFF)
