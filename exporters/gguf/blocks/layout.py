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
    return data.reshape(-1).view(np.uint64)


def runs(codes: Codes, length: int, count: int) -> list[Words]:
    """Codes [n·count·length] as `count` arrays of words: every count-th run of `length` codes, from the first, second …

    What shares bytes is in different arrays then, so that whole arrays can be put together.
    """
    elements = codes.reshape(-1).view(f"V{length}").reshape(-1, count)
    planes = np.ascontiguousarray(elements.T)  # copies `length` bytes at a time
    return list(planes.reshape(-1).view(np.uint64).reshape(count, -1))


def nibbles(codes: Codes, run: int) -> Words:
    """Codes of four bits: each `run` of them are low nibbles, those of the next run the high ones of the same bytes."""
    low, high = runs(codes, run, 2)
    high <<= 4
    high |= low
    return high


def bit_pairs(codes: Codes) -> Words:
    """Codes of two bits: each 128 are four groups of 32 that share 32 bytes, the first in the lowest bits."""
    return _overlaid(runs(codes, 32, 4), 2)


def single_bits(codes: Codes) -> Words:
    """Codes of one bit: each 256 are eight groups of 32 that share 32 bytes, the first in the lowest bit."""
    return _overlaid(runs(codes, 32, 8), 1)


def _overlaid(groups: list[Words], bits: int) -> Words:
    *others, found = groups
    for group in reversed(others):
        found <<= bits
        found |= group
    return found


def neighbours(codes: Codes) -> Bytes:
    """Codes of two bits, each four that follow one another in a byte: [n] as [n/4]."""
    fours = codes.reshape(-1).view("<u4")
    twos = fours | (fours >> 6)
    found: Bytes = (twos | (twos >> 12)).astype(np.uint8)  # the lowest byte of each
    return found


def side_by_side(units: int, parts: Sequence[NDArray[Any]]) -> Bytes:
    """Parts with the same number of bytes a unit each, in their order: uint8 [U, bytes a unit].

    Like `np.concatenate`, which copies byte by byte where a part of a unit has less than some hundred.
    """
    sizes = [part.nbytes // units for part in parts]
    whole = np.empty((units, sum(sizes)), dtype=np.uint8)
    start = 0
    for size, part in zip(sizes, parts, strict=True):
        element = f"V{size}"
        whole[:, start : start + size].view(element)[:, 0] = part.reshape(-1).view(element)
        start += size
    return whole


def fp16_bytes(values: NDArray[Any]) -> Bytes:
    """fp16 [U, n] as little-endian bytes [U, 2n]."""
    return np.ascontiguousarray(values, dtype="<f2").view(np.uint8)


def fp16_values(data: Bytes) -> NDArray[np.float16]:
    """Little-endian bytes [U, 2n] as fp16 [U, n]."""
    return np.ascontiguousarray(data).view("<f2").astype(np.float16, copy=False)
