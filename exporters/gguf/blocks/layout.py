"""What a block layout is: how one ggml type arranges codes and scale fields in bytes.

Source of all layouts: the `block_*` structs in ggml-common.h, the order of bits in `dequantize_row_*` of ggml-quants.c.

Shapes: a matrix [R, K] has R·K/V units of V values (32, 64 or 256), each of `unit_bytes` bytes. Codes of units are
[U, V]; scale fields [U, n] with n values a unit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporters.gguf.blocks.ggml_types import BY_NAME, GgmlType

Bytes = NDArray[np.uint8]
Codes = NDArray[Any]
UnitFields = dict[str, NDArray[Any]]

BIT_PAIRS = np.array([0, 2, 4, 6], dtype=np.uint8)  # where the four 2-bit codes of a byte begin


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


def fp16_bytes(values: NDArray[Any]) -> Bytes:
    """fp16 [U, n] as little-endian bytes [U, 2n]."""
    return np.ascontiguousarray(values, dtype="<f2").view(np.uint8)


def fp16_values(data: Bytes) -> NDArray[np.float16]:
    """Little-endian bytes [U, 2n] as fp16 [U, n]."""
    return np.ascontiguousarray(data).view("<f2").astype(np.float16, copy=False)
