"""What a block layout is: how one ggml type arranges codes and scale fields in bytes.

Source of all layouts: the `block_*` structs in ggml-common.h, the order of bits in `dequantize_row_*` of ggml-quants.c.

Shapes: a matrix [R, K] has R·K/V units of V values (32, 64 or 256), each of `unit_bytes` bytes. Codes of units are
[U, V]; scale fields [U, n] with n values a unit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporters.gguf.blocks.ggml_types import BY_NAME, GgmlType

Bytes = NDArray[np.uint8]
Codes = NDArray[Any]
UnitFields = dict[str, NDArray[Any]]

Words = NDArray[np.uint64]

BIT_PAIRS = np.array([0, 2, 4, 6], dtype=np.uint8)  # where the four 2-bit codes of a byte begin
LOW_NIBBLES, LOW_PAIRS, LOW_BITS = (np.uint64(0x0101010101010101 * mask) for mask in (15, 3, 1))


class BlockLayout(ABC):
    """How one ggml type lays out the codes and scale fields of a unit.

    Attributes:
        name: the name of the grid and of the ggml type ("Q4_0").
    """

    name: str

    @property
    def ggml_type(self) -> GgmlType:
        """The type in a GGUF file."""
        return BY_NAME[self.name]

    @property
    def unit_values(self) -> int:
        """Values a unit."""
        return self.ggml_type.block_values

    @property
    def unit_bytes(self) -> int:
        """Bytes a unit."""
        return self.ggml_type.block_bytes

    @abstractmethod
    def pack_units(self, codes: Codes, fields: UnitFields) -> Bytes:
        """Bytes uint8 [U, unit_bytes] of codes [U, unit_values] and fields [U, n]."""

    @abstractmethod
    def unpack_units(self, units: Bytes) -> tuple[Codes, UnitFields]:
        """The inverse of `pack_units`."""


def words(data: NDArray[Any]) -> Words:
    """Bytes, eight to a word: numpy shifts words an order of magnitude faster than single bytes.

    A shift moves bits of one byte into the next, so the bytes have to have room for it, or be masked.
    """
    return np.ascontiguousarray(data).reshape(-1).view(np.uint64)


def runs(codes: Codes, length: int, count: int) -> list[Words]:
    """Codes [U, count·length] as `count` runs, each as the words of all units: [U·length/8].

    What shares bytes is in different runs, so that all bits can be put together by whole arrays.
    """
    elements = np.ascontiguousarray(codes).reshape(-1).view(f"V{length}").reshape(-1, count)
    planes = np.ascontiguousarray(elements.T)  # one copy of `length` bytes a run and unit
    return list(planes.reshape(-1).view(np.uint64).reshape(count, -1))


def bit_pairs(first: Words, second: Words, third: Words, fourth: Words) -> Words:
    """Codes of two bits, four to a byte, the first in the lowest bits."""
    found = fourth << 2
    for codes in (third, second):
        found |= codes
        found <<= 2
    found |= first
    return found


def neighbours(codes: Codes) -> Bytes:
    """Codes of two bits, each four that follow one another in a byte: [n] as [n/4]."""
    fours = np.ascontiguousarray(codes).reshape(-1).view("<u4")
    twos = fours | (fours >> 6)
    return (twos | (twos >> 12)).astype(np.uint8)  # the lowest byte of each


def side_by_side(units: int, parts: Sequence[NDArray[Any]]) -> Bytes:
    """Parts with the same number of bytes a unit each, in their order: uint8 [U, bytes a unit].

    Like `np.concatenate`, which copies byte by byte where a part of a unit has less than some hundred.
    """
    sizes = [part.nbytes // units for part in parts]
    whole = np.empty((units, sum(sizes)), dtype=np.uint8)
    start = 0
    for size, part in zip(sizes, parts, strict=True):
        elements = np.ascontiguousarray(part).reshape(-1).view(f"V{size}")
        np.copyto(whole[:, start : start + size].view(f"V{size}")[:, 0], elements)
        start += size
    return whole


def fp16_bytes(values: NDArray[Any]) -> Bytes:
    """fp16 [U, n] as little-endian bytes [U, 2n]."""
    return np.ascontiguousarray(values, dtype="<f2").view(np.uint8)


def fp16_values(data: Bytes) -> NDArray[np.float16]:
    """Little-endian bytes [U, 2n] as fp16 [U, n]."""
    return np.ascontiguousarray(data).view("<f2").astype(np.float16, copy=False)
