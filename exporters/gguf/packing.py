"""Bit packing of quantized tensors into ggml blocks, and back. Only bits move here: nothing is rounded or multiplied.

One class per family of block layouts, one row per type in `_ROWS`. Source of the layouts: the `block_*` structs in
ggml-common.h and the order of nibbles and high bits in `dequantize_row_*` of ggml-quants.c.

Shapes: a matrix [R, K] has R·K/V units of V values (32, or 256 for K-quants), each of `unit_bytes` bytes. Codes of
units are [U, V]; scale fields [U, n] with n values a unit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from signround_edge.errors import UserError
from signround_edge.formats import QuantizedTensor, get_grid

Bytes = NDArray[np.uint8]
Codes = NDArray[Any]
UnitFields = dict[str, NDArray[Any]]


class BlockLayout(ABC):
    """How one ggml type lays out the codes and scale fields of a unit.

    Attributes:
        name: the name of the grid and of the ggml type ("Q4_0").
        ggml_type: the type's number in a GGUF file.
        unit_values: values a unit.
        unit_bytes: bytes a unit.
    """

    name: str
    ggml_type: GGMLQuantizationType
    unit_values: int
    unit_bytes: int

    @abstractmethod
    def pack_units(self, codes: Codes, fields: UnitFields) -> Bytes:
        """Bytes uint8 [U, unit_bytes] of codes [U, unit_values] and fields [U, n]."""

    @abstractmethod
    def unpack_units(self, units: Bytes) -> tuple[Codes, UnitFields]:
        """The inverse of `pack_units`."""


class SingleScaleLayout(BlockLayout):
    """Q4_0, Q4_1, Q5_0, Q5_1: fp16 fields, then (5 bits) 32 high bits, then nibbles j and j+16 in one byte."""

    unit_values = 32

    def __init__(self, name: str, bits: int, fields: tuple[str, ...]) -> None:
        self.name = name
        self.ggml_type = GGMLQuantizationType[name]
        self.high_bytes = 4 if bits == 5 else 0
        self.fields = fields
        self.unit_bytes = 2 * len(fields) + self.high_bytes + 16

    def pack_units(self, codes: Codes, fields: UnitFields) -> Bytes:
        parts: list[NDArray[Any]] = [_fp16_bytes(fields[name]) for name in self.fields]
        if self.high_bytes:
            parts.append(np.packbits(codes >> 4, axis=-1, bitorder="little"))
        parts.append((codes[:, :16] & 15) | ((codes[:, 16:] & 15) << 4))
        return np.concatenate(parts, axis=-1)

    def unpack_units(self, units: Bytes) -> tuple[Codes, UnitFields]:
        fields = {name: _fp16_values(units[:, 2 * i : 2 * i + 2]) for i, name in enumerate(self.fields)}
        nibbles = units[:, -16:]
        codes = np.concatenate([nibbles & 15, nibbles >> 4], axis=-1)
        if self.high_bytes:
            high = units[:, -16 - self.high_bytes : -16]
            codes |= np.unpackbits(high, axis=-1, bitorder="little") << 4
        return codes, fields


class Q80Layout(BlockLayout):
    """Q8_0: fp16 d, then 32 signed bytes."""

    name = "Q8_0"
    ggml_type = GGMLQuantizationType.Q8_0
    unit_values = 32
    unit_bytes = 34

    def pack_units(self, codes: Codes, fields: UnitFields) -> Bytes:
        return np.concatenate([_fp16_bytes(fields["scale"]), codes.view(np.uint8)], axis=-1)

    def unpack_units(self, units: Bytes) -> tuple[Codes, UnitFields]:
        return np.ascontiguousarray(units[:, 2:]).view(np.int8), {"scale": _fp16_values(units[:, :2])}


class Q6KLayout(BlockLayout):
    """Q6_K: 128 bytes of low nibbles, 64 of high bit pairs, 16 int8 sub-scales, fp16 d.

    Each half of 128 values is four groups of 32: groups 0 and 2 share the first 32 bytes of nibbles, 1 and 3 the next,
    and all four share 32 bytes of bit pairs.
    """

    name = "Q6_K"
    ggml_type = GGMLQuantizationType.Q6_K
    unit_values = 256
    unit_bytes = 210

    def pack_units(self, codes: Codes, fields: UnitFields) -> Bytes:
        groups = codes.reshape(-1, 2, 4, 32)
        low, high = groups & 15, groups >> 4
        nibbles = low[:, :, :2] | (low[:, :, 2:] << 4)
        pairs = high[:, :, 0] | (high[:, :, 1] << 2) | (high[:, :, 2] << 4) | (high[:, :, 3] << 6)
        units = len(groups)
        parts = [nibbles.reshape(units, 128), pairs.reshape(units, 64), fields["sub_scale"].view(np.uint8)]
        return np.concatenate([*parts, _fp16_bytes(fields["super_scale"])], axis=-1)

    def unpack_units(self, units: Bytes) -> tuple[Codes, UnitFields]:
        nibbles = units[:, :128].reshape(-1, 2, 2, 32)
        pairs = units[:, 128:192].reshape(-1, 2, 1, 32)
        low = np.concatenate([nibbles & 15, nibbles >> 4], axis=2)
        high = (pairs >> np.array([0, 2, 4, 6], dtype=np.uint8).reshape(4, 1)) & 3
        codes = (low | (high << 4)).reshape(-1, 256)
        sub_scale = np.ascontiguousarray(units[:, 192:208]).view(np.int8)
        return codes, {"sub_scale": sub_scale, "super_scale": _fp16_values(units[:, 208:])}


_ROWS: tuple[BlockLayout, ...] = (
    SingleScaleLayout("Q4_0", bits=4, fields=("scale",)),
    SingleScaleLayout("Q4_1", bits=4, fields=("scale", "minimum")),
    SingleScaleLayout("Q5_0", bits=5, fields=("scale",)),
    SingleScaleLayout("Q5_1", bits=5, fields=("scale", "minimum")),
    Q80Layout(),
    Q6KLayout(),
)

LAYOUTS: dict[str, BlockLayout] = {layout.name: layout for layout in _ROWS}


def layout_of(grid_name: str) -> BlockLayout | None:
    """The ggml layout of a grid, or None when GGUF has no such type."""
    return LAYOUTS.get(grid_name)


def require_layout(grid_name: str, tensor: str) -> BlockLayout:
    """The ggml layout of a grid; UserError when GGUF has no such type."""
    layout = layout_of(grid_name)
    if layout is None:
        raise UserError(
            f"{tensor} is quantized as {grid_name}, which GGUF cannot store; schemes that export to GGUF are those of "
            f"{', '.join(LAYOUTS)} (gguf:q4_0, onnx:w4g32, onnx:w8g32, …), and `--dtype f16` writes this run as floats"
        )
    return layout


def pack(tensor: QuantizedTensor) -> Bytes:
    """The rows of a tensor as ggml blocks, uint8 [R, bytes a row]. UserError when GGUF has no such type.

    Rows are independent, so a row permutation of the matrix is the same permutation of the result.
    """
    layout = require_layout(tensor.grid.name, "this tensor")
    rows, cols = tensor.shape
    units = rows * cols // layout.unit_values
    codes = tensor.codes.contiguous().numpy().reshape(units, layout.unit_values)
    fields = {name: value.contiguous().numpy().reshape(units, -1) for name, value in tensor.fields.items()}
    return layout.pack_units(codes, fields).reshape(rows, -1)


def unpack(grid_name: str, data: Bytes) -> QuantizedTensor:
    """The tensor whose `pack` is `data` (uint8 [R, bytes a row])."""
    layout, grid = LAYOUTS[grid_name], get_grid(grid_name)
    rows = data.shape[0]
    codes, fields = layout.unpack_units(np.ascontiguousarray(data).reshape(-1, layout.unit_bytes))
    tensors = {name: torch.from_numpy(np.ascontiguousarray(v)).reshape(rows, -1) for name, v in fields.items()}
    return QuantizedTensor(grid, torch.from_numpy(np.ascontiguousarray(codes)).reshape(rows, -1), tensors)


def _fp16_bytes(values: NDArray[Any]) -> Bytes:
    """fp16 [U, n] as little-endian bytes [U, 2n]."""
    return np.ascontiguousarray(values, dtype="<f2").view(np.uint8)


def _fp16_values(data: Bytes) -> NDArray[np.float16]:
    """Little-endian bytes [U, 2n] as fp16 [U, n]."""
    return np.ascontiguousarray(data).view("<f2").astype(np.float16, copy=False)
