"""Packing of quantized tensors into ggml blocks, and back. Only bits move here: nothing is rounded or multiplied."""

from __future__ import annotations

import numpy as np
import torch

from exporters.gguf.blocks.k_quants import IQ4XSLayout, Q2KLayout, Q3KLayout, Q6KLayout, Q45KLayout
from exporters.gguf.blocks.layout import BlockLayout, Bytes
from exporters.gguf.blocks.legacy import Q10Layout, Q20Layout, Q80Layout, SingleScaleLayout
from exporters.gguf.blocks.small_floats import SmallFloatLayout
from exporters.gguf.blocks.ternary import TQ10Layout, TQ20Layout
from exporters.gguf.blocks.ternary_vectors import IQ1MLayout, IQ1SLayout
from exporters.gguf.blocks.vectors import IQ2SLayout, IQ2XSLayout, IQ2XXSLayout, IQ3SLayout, IQ3XXSLayout
from signround_edge.errors import UserError
from signround_edge.formats import QuantizedTensor, get_grid

_ROWS: tuple[BlockLayout, ...] = (
    Q10Layout(),
    TQ10Layout(),
    TQ20Layout(),
    Q20Layout(),
    SingleScaleLayout("Q4_0", bits=4, fields=("scale",)),
    SingleScaleLayout("Q4_1", bits=4, fields=("scale", "minimum")),
    SingleScaleLayout("Q5_0", bits=5, fields=("scale",)),
    SingleScaleLayout("Q5_1", bits=5, fields=("scale", "minimum")),
    SingleScaleLayout("IQ4_NL", bits=4, fields=("scale",)),
    Q80Layout(),
    SmallFloatLayout("MXFP4", run=16),
    SmallFloatLayout("NVFP4", run=8),
    Q2KLayout(),
    Q3KLayout(),
    Q45KLayout("Q4_K", bits=4),
    Q45KLayout("Q5_K", bits=5),
    Q6KLayout(),
    IQ4XSLayout(),
    IQ1SLayout(),
    IQ1MLayout(),
    IQ2XXSLayout(),
    IQ2XSLayout(),
    IQ2SLayout(),
    IQ3XXSLayout(),
    IQ3SLayout(),
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
