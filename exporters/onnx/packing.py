"""Bit packing of MatMulNBits and GatherBlockQuantized operands. Bits move here; no value changes.

Layout (ONNX Runtime, docs/ContribOperators.md, MatMulNBits): B is uint8 [N, blocks, g·bits/8], zero points are uint8
[N, ceil(blocks·bits/8)] with every row padded to a whole byte, the lowest bits of a byte first; scales are [N, blocks].
GatherBlockQuantized reads the same bytes, with B seen as [N, K·bits/8].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from signround_edge.formats import Grid, QuantizedTensor, as_matmul_nbits
from signround_edge.formats.matmul_nbits import matmul_nbits_container
from signround_edge.run_directory import dtype_name

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class OperandLayout:
    """Shapes and dtypes of the operands of a weight matrix [N, K], known without packing it.

    Attributes:
        rows: N.
        cols: K.
        bits: bits of a code (2, 4 or 8).
        block_size: g, input features that share a scale.
        scale_dtype: "float32" or "float16".
    """

    rows: int
    cols: int
    bits: int
    block_size: int
    scale_dtype: str

    @property
    def weight_shape(self) -> tuple[int, int, int]:
        """[N, K/g, g·bits/8], as MatMulNBits reads the codes."""
        return *self.scales_shape, self.block_size * self.bits // 8

    @property
    def gathered_shape(self) -> tuple[int, int]:
        """[N, K·bits/8], as GatherBlockQuantized reads them."""
        return self.rows, self.cols * self.bits // 8

    @property
    def scales_shape(self) -> tuple[int, int]:
        """[N, K/g]."""
        return self.rows, self.cols // self.block_size

    @property
    def zero_points_shape(self) -> tuple[int, int]:
        """[N, ceil(K/g·bits/8)]."""
        return self.rows, math.ceil(self.scales_shape[1] * self.bits / 8)


@dataclass(frozen=True)
class Operands:
    """One weight matrix [N, K] as MatMulNBits stores it.

    Attributes:
        bits: bits of a code (2, 4 or 8).
        block_size: g, input features that share a scale.
        weight: uint8 [N, K/g, g·bits/8].
        scales: f32 [N, K/g], or f16 where they are stored so.
        zero_points: uint8 [N, ceil(K/g·bits/8)].
    """

    bits: int
    block_size: int
    weight: Bytes
    scales: NDArray[np.float32] | NDArray[np.float16]
    zero_points: Bytes

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.weight.shape[0], self.weight.shape[1] * self.block_size


def pack_bits(values: Bytes, bits: int) -> Bytes:
    """Pack uint8 [R, C] of `bits`-bit values into uint8 [R, ceil(C·bits/8)], lowest bits first, rows padded with 0.

    Values of 8 bits are returned as they are, without a copy: an embedding of them is the largest matrix there is.
    """
    per_byte = 8 // bits
    if per_byte == 1:
        return values
    missing = -values.shape[1] % per_byte
    padded = np.pad(values, ((0, 0), (0, missing))) if missing else values
    packed = np.zeros((values.shape[0], padded.shape[1] // per_byte), dtype=np.uint8)
    for i in range(per_byte):
        packed |= padded[:, i::per_byte] << (i * bits)
    return packed


def unpack_bits(packed: Bytes, bits: int, columns: int) -> Bytes:
    """The inverse of `pack_bits`: uint8 [R, columns]."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    values = (packed[:, :, None] >> shifts) & np.uint8((1 << bits) - 1)
    return values.reshape(packed.shape[0], -1)[:, :columns]


def pack_operands(tensor: QuantizedTensor, half_scales: bool = False) -> Operands | None:
    """The operands of a quantized matrix, or None where its grid has no MatMulNBits form.

    Args:
        half_scales: scales in f16 where the grid's are fp16 values, which loses nothing.
    """
    view = as_matmul_nbits(tensor)
    if view is None:
        return None
    rows, blocks = view.scales.shape
    scales = view.scales.to(_scale_dtype(tensor.grid, half_scales))
    return Operands(
        bits=view.bits,
        block_size=view.block_size,
        weight=pack_bits(view.codes.numpy(), view.bits).reshape(rows, blocks, -1),
        scales=np.ascontiguousarray(scales.numpy()),
        zero_points=pack_bits(view.zero_points.numpy(), view.bits),
    )


def stack_rows(parts: list[Operands]) -> Operands:
    """The operands of matrices stacked along N (a packed QKV projection); they must agree in bits and block size.

    Where one part has f32 scales, all have.
    """
    first = parts[0]
    assert all((p.bits, p.block_size, p.shape[1]) == (first.bits, first.block_size, first.shape[1]) for p in parts)
    return Operands(
        first.bits,
        first.block_size,
        np.concatenate([p.weight for p in parts]),
        np.concatenate([p.scales for p in parts]),
        np.concatenate([p.zero_points for p in parts]),
    )


def take_rows(operands: Operands, rows: Sequence[tuple[int, int]]) -> Operands:
    """Ranges of rows, one after the other; views where it is one range."""

    def taken(array: NDArray[Any]) -> NDArray[Any]:
        parts = [array[start:stop] for start, stop in rows]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    return replace(
        operands,
        weight=taken(operands.weight),
        scales=taken(operands.scales),
        zero_points=taken(operands.zero_points),
    )


def rows_by_turns(stacked: NDArray[Any], parts: int, alternate: int) -> NDArray[Any]:
    """Rows of stacked arrays of one shape: `alternate` in a row give theirs by turns, a, b, a, b."""
    if alternate == 1:
        return stacked
    turns = stacked.reshape(parts // alternate, alternate, -1, *stacked.shape[1:]).swapaxes(1, 2)
    return np.ascontiguousarray(turns).reshape(stacked.shape)


def alternate_rows(operands: Operands, parts: int, alternate: int) -> Operands:
    """The same of the rows of operands."""
    return replace(
        operands,
        weight=rows_by_turns(operands.weight, parts, alternate),
        scales=rows_by_turns(operands.scales, parts, alternate),
        zero_points=rows_by_turns(operands.zero_points, parts, alternate),
    )


def layout_of(grid: Grid, rows: int, cols: int, half_scales: bool = False) -> OperandLayout | None:
    """The layout of what `pack_operands` makes of a matrix [rows, cols] on that grid."""
    container = matmul_nbits_container(grid)
    if container is None:
        return None
    return OperandLayout(rows, cols, *container, dtype_name(_scale_dtype(grid, half_scales)))


def stack_layouts(parts: list[OperandLayout]) -> OperandLayout:
    """The layout of what `stack_rows` makes of such parts."""
    dtype = "float32" if any(p.scale_dtype == "float32" for p in parts) else "float16"
    return replace(parts[0], rows=sum(p.rows for p in parts), scale_dtype=dtype)


def _scale_dtype(grid: Grid, half_scales: bool) -> torch.dtype:
    return torch.float16 if half_scales and grid.fp16_scales else torch.float32
