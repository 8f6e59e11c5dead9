"""The run directory's tensors as a graph stores them: packed operands, or floats, of one or several parameters."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from exporters.onnx.bindings import Binding, Rows
from exporters.onnx.functions import FUNCTIONS
from exporters.onnx.packing import (
    OperandLayout,
    Operands,
    alternate_rows,
    layout_of,
    pack_operands,
    rows_by_turns,
    stack_layouts,
    stack_rows,
    take_rows,
)
from signround_edge.errors import UserError
from signround_edge.formats import get_grid
from signround_edge.formats.grid import to_fp16
from signround_edge.manifest import TensorEntry
from signround_edge.run_directory import RunDirectory

FloatArray = NDArray[np.float32]


class RunWeights:
    """Reads a run's tensors by binding. Only the last packed matrix is kept, since its three operands follow in a row.

    Every method raises UserError when the run lacks a parameter (the artifact belongs to another model).

    Args:
        half_scales: operands have f16 scales where that loses nothing.
    """

    def __init__(self, run: RunDirectory, half_scales: bool = False) -> None:
        self.run = run
        self.half_scales = half_scales
        self._names = set(run.names())
        self._last: tuple[tuple[tuple[str, ...], int], Operands] | None = None

    def owner(self, parameter: str) -> str:
        """The parameter that holds the data: itself, or the one that it is tied to."""
        name = self.run.manifest.tied.get(parameter, parameter)
        if name not in self._names:
            raise UserError(
                f"{self.run.path} has no parameter {parameter}; the artifact was exported from the run of another model"
            )
        return name

    def is_quantized(self, parameters: tuple[str, ...]) -> bool:
        """Whether the run stores all of these parameters as codes."""
        return all(self.run.is_quantized(self.owner(p)) for p in parameters)

    def layout(self, parameters: tuple[str, ...], rows: Rows = ()) -> OperandLayout:
        """The layout of their `operands`."""
        whole = stack_layouts([self._layout(p) for p in parameters])
        return replace(whole, rows=sum(stop - start for start, stop in rows)) if rows else whole

    def operands(self, parameters: tuple[str, ...], rows: Rows = (), alternate: int = 1) -> Operands:
        """Packed operands of quantized parameters, stacked in order; of those only some rows.

        Args:
            alternate: see `Binding`.
        """
        owners = tuple(self.owner(p) for p in parameters)
        if self._last is None or self._last[0] != (owners, alternate):
            self._last = None  # not in memory while the next one is made
            packed = [self._pack(p) for p in owners]
            stacked = packed[0] if len(packed) == 1 else stack_rows(packed)
            self._last = ((owners, alternate), alternate_rows(stacked, len(owners), alternate))
        return take_rows(self._last[1], rows) if rows else self._last[1]

    def rows(self, binding: Binding) -> FloatArray:
        """f32 weights in the artifact's row order: [N] of a norm weight or bias, [N, K] of a matrix.

        Float Conv1D weights are [K, N], as Hugging Face has them.

        Raises:
            UserError: the graph keeps several parameters once, and in this run they differ.
        """
        names = [self.owner(p) for p in binding.parameters]
        stacked = torch.cat([self.run.dequantized(name) for name in names])
        for duplicate in binding.duplicates:
            if not torch.equal(self.run.dequantized(self.owner(duplicate)), stacked):
                raise UserError(
                    f"tensors {names[0]} and {duplicate} of {self.run.path} differ, but the artifact keeps them as "
                    "one; it was exported from another run"
                )
        if binding.quantized and self.run.entry(names[0]).transposed:
            stacked = stacked.T.contiguous()
        if binding.rows:
            stacked = torch.cat([stacked[start:stop] for start, stop in binding.rows])
        stacked = FUNCTIONS[binding.function](stacked)
        weights: FloatArray = rows_by_turns(stacked.numpy(), len(names), binding.alternate)
        return weights

    def stored_floats(self, binding: Binding, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
        """The array of a float initializer: `rows`, transposed where the graph wants that; "float16" rounds it.

        Args:
            shape: the initializer's; axes of length 1 come and go there. An array of another size keeps its own.
        """
        weights = torch.from_numpy(self.rows(binding))
        if binding.transposed:
            weights = weights.T
        if dtype == "float16":
            weights = to_fp16(weights)
        array = np.ascontiguousarray(weights.numpy())
        return array.reshape(shape) if array.size == math.prod(shape) else array

    def _layout(self, parameter: str) -> OperandLayout:
        entry = self.run.entry(self.owner(parameter))
        rows, cols = entry.out_in_shape
        layout = layout_of(get_grid(str(entry.format)), rows, cols, self.half_scales)
        if layout is None:
            raise _cannot_hold(entry)
        return layout

    def _pack(self, parameter: str) -> Operands:
        name = self.owner(parameter)
        operands = pack_operands(self.run.quantized(name), self.half_scales)
        if operands is None:
            raise _cannot_hold(self.run.entry(name))
        return operands


def _cannot_hold(entry: TensorEntry) -> UserError:
    return UserError(f"tensor {entry.name} is {entry.format}, which MatMulNBits cannot hold; use --dtype f32")
