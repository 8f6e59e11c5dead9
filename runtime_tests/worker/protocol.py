"""The protocol between `verify` and a worker: frames of a JSON header and raw arrays, over two byte streams.

A frame is the four bytes `SRE1`, the length of the header (uint32, little-endian), the header (a JSON object whose
"arrays" lists [name, dtype, shape]), and the arrays' bytes in that order, little-endian, row by row.
The client sends one request frame and reads one reply frame; the end of the stream ends the worker.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

_MAGIC = b"SRE1"
_DTYPES = ("<f4", "<i4", "<i8", "|u1")
_MAX_HEADER = 64 << 20  # a text to tokenize travels in the header
_MAX_ARRAY = 32 << 30


class ProtocolError(Exception):
    """The other side sent something that is not a frame."""


@dataclass(frozen=True)
class Message:
    """One request or reply: a JSON object and named arrays (f32, i32, i64 or u8)."""

    header: dict[str, Any]
    arrays: dict[str, NDArray[Any]] = field(default_factory=dict)


def send(stream: BinaryIO, message: Message) -> None:
    """Write one frame and flush."""
    arrays = {name: np.ascontiguousarray(array) for name, array in message.arrays.items()}
    listed = [[name, array.dtype.newbyteorder("<").str, list(array.shape)] for name, array in arrays.items()]
    header = json.dumps({**message.header, "arrays": listed}).encode()
    stream.write(_MAGIC + struct.pack("<I", len(header)) + header)
    for array in arrays.values():
        if array.size:
            stream.write(array.data.cast("B"))
    stream.flush()


def receive(stream: BinaryIO) -> Message | None:
    """Read one frame; None at the end of the stream. Raises ProtocolError on anything else."""
    start = stream.read(8)
    if not start:
        return None
    if len(start) < 8 or start[:4] != _MAGIC:
        raise ProtocolError(f"expected a frame, got {start!r}")
    (length,) = struct.unpack("<I", start[4:])
    if length > _MAX_HEADER:
        raise ProtocolError(f"a header of {length} bytes")
    try:
        header = json.loads(_read_exactly(stream, length))
        listed = [(str(name), str(dtype), [int(n) for n in shape]) for name, dtype, shape in header.pop("arrays")]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ProtocolError(f"unreadable header ({error})") from error
    return Message(header, {name: _read_array(stream, dtype, shape) for name, dtype, shape in listed})


def _read_array(stream: BinaryIO, dtype: str, shape: list[int]) -> NDArray[Any]:
    size = math.prod(shape) * np.dtype(dtype).itemsize if dtype in _DTYPES and min(shape, default=0) >= 0 else -1
    if not 0 <= size <= _MAX_ARRAY:
        raise ProtocolError(f"an array of type {dtype} and shape {shape}")
    array = np.empty(shape, dtype=dtype)
    if size:
        view = array.data.cast("B")
        filled = 0
        while filled < size:
            count = stream.readinto(view[filled:])  # type: ignore[attr-defined]
            if not count:
                raise ProtocolError(f"the stream ended {size - filled} bytes before the end of an array")
            filled += count
    return array


def _read_exactly(stream: BinaryIO, length: int) -> bytes:
    data = stream.read(length)
    if len(data) != length:
        raise ProtocolError(f"the stream ended {length - len(data)} bytes before the end of a header")
    return data
