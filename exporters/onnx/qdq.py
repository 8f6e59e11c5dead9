"""Operands of DequantizeLinear: the same integers and scales as MatMulNBits has, in the layout of ONNX's own operators.

Source: the ONNX operator DequantizeLinear (opset 21: blocks and 4 bits; opset 25: 2 bits): y = (x − zero point)·scale,
computed in f32; x − zero point is exact, so the weights are bit for bit the run's. A MatMul wants its weight as [K, N]
with blocks along axis 0, a Gather its embedding as [N, K] with blocks along axis 1. Where a whole row has one scale,
that is the operator's form per channel: scales are [N], and there is no block size.

Codes are signed, without zero points, where the grid is symmetric and its codes fit: w4g32 is int4 −8…7. That is the
form that NPUs take. Others are unsigned with a zero point for each scale.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from exporters.onnx.bindings import Binding
from exporters.onnx.packing import unpack_bits
from exporters.onnx.run_weights import RunWeights
from signround_edge.errors import CheckFailed
from signround_edge.formats import Grid, get_grid

OPERATOR = "DequantizeLinear"
_TYPES = {
    (2, True): ir.DataType.INT2,
    (4, True): ir.DataType.INT4,
    (8, True): ir.DataType.INT8,
    (2, False): ir.DataType.UINT2,
    (4, False): ir.DataType.UINT4,
    (8, False): ir.DataType.UINT8,
}


@dataclass(frozen=True)
class QdqLayout:
    """How DequantizeLinear holds a matrix [N, K].

    Attributes:
        rows, cols: N and K.
        bits: bits of a code (2, 4 or 8).
        block_size: values along K that share a scale; K itself means per channel.
        zero: zero point of all codes where they are stored signed, without it; None where each block has its own.
        scale_dtype: "float32" or "float16".
        columns_first: stored as [K, N].
    """

    rows: int
    cols: int
    bits: int
    block_size: int
    zero: int | None
    scale_dtype: str
    columns_first: bool

    @property
    def dtype(self) -> ir.DataType:
        """Of codes and zero points."""
        return _TYPES[self.bits, self.zero is not None]

    @property
    def per_channel(self) -> bool:
        """One scale a row."""
        return self.block_size == self.cols

    @property
    def weight_shape(self) -> tuple[int, int]:
        """Of the codes."""
        return (self.cols, self.rows) if self.columns_first else (self.rows, self.cols)

    @property
    def scales_shape(self) -> tuple[int, ...]:
        """Of scales and zero points."""
        if self.per_channel:
            return (self.rows,)
        blocks = self.cols // self.block_size
        return (blocks, self.rows) if self.columns_first else (self.rows, blocks)

    @property
    def attributes(self) -> dict[str, int]:
        """Of the DequantizeLinear."""
        if self.per_channel:
            return {"axis": 1 if self.columns_first else 0}
        return {"axis": 0 if self.columns_first else 1, "block_size": self.block_size}


def qdq_layout(weights: RunWeights, binding: Binding, columns_first: bool) -> QdqLayout:
    """The layout of a binding's quantized rows, known without packing them."""
    layout = weights.layout(binding.parameters, binding.rows)
    grids = [get_grid(str(weights.run.entry(weights.owner(p)).format)) for p in binding.parameters]
    block_size = math.gcd(*(grid.block_size for grid in grids))
    zeros = {_common_zero(grid, layout.bits) for grid in grids}
    zero = zeros.pop() if len(zeros) == 1 else None
    return QdqLayout(layout.rows, layout.cols, layout.bits, block_size, zero, layout.scale_dtype, columns_first)


def _common_zero(grid: Grid, bits: int) -> int | None:
    """The zero point of all unsigned codes of a symmetric grid, if the codes less it fit into signed ones."""
    if grid.affine:
        return None
    zero, half = grid.anchor - grid.code_min, 1 << (bits - 1)
    return zero if zero <= half and grid.code_max - grid.code_min - zero < half else None


def qdq_operands(weights: RunWeights, binding: Binding, layout: QdqLayout) -> dict[str, NDArray[Any]]:
    """ "weight" int8 or uint8 with a code in each byte, "scales", and "zero_points" uint8 where each block has its own.

    Raises:
        CheckFailed: a grid that calls itself symmetric has another zero point.
    """
    operands = weights.operands(binding.parameters, binding.rows)
    rows, blocks = operands.scales.shape
    step = layout.block_size // operands.block_size
    codes = unpack_bits(operands.weight.reshape(rows, -1), layout.bits, layout.cols)
    zeros = unpack_bits(operands.zero_points, layout.bits, blocks)
    found: dict[str, NDArray[Any]] = {"weight": codes, "scales": operands.scales[:, ::step]}
    if layout.zero is None:
        found["zero_points"] = zeros[:, ::step]
    else:
        if (zeros != layout.zero).any():
            raise CheckFailed(f"tensor {binding.parameters[0]} has zero points that its symmetric grid has not")
        found["weight"] = (codes - np.uint8(layout.zero)).view(np.int8)
    if layout.columns_first:
        found = {role: array.T for role, array in found.items()}
    shapes = {"weight": layout.weight_shape, "scales": layout.scales_shape, "zero_points": layout.scales_shape}
    return {role: np.ascontiguousarray(array).reshape(shapes[role]) for role, array in found.items()}


def packed_tensor(codes: NDArray[Any], dtype: ir.DataType, name: str) -> ir.TensorProtocol:
    """Codes in bytes → a tensor of that type: the first value in the lowest bits, across rows (ONNX, docs/docsgen)."""
    bits = dtype.bitwidth
    if bits == 8:
        return ir.Tensor(codes.view(np.int8 if dtype == ir.DataType.INT8 else np.uint8), dtype=dtype, name=name)
    flat = codes.reshape(-1).view(np.uint8) & np.uint8((1 << bits) - 1)
    per_byte = 8 // bits
    flat = np.pad(flat, (0, -flat.size % per_byte))
    packed = np.zeros(flat.size // per_byte, dtype=np.uint8)
    for i in range(per_byte):
        packed |= flat[i::per_byte] << np.uint8(i * bits)
    return ir.PackedTensor(packed, dtype, shape=ir.Shape(codes.shape), name=name)
