"""From a run's parameters to the tensors of a GGUF file: which type each gets, and its bytes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from exporters.gguf.blocks.ggml_types import BF16, F16, F32, GgmlType
from exporters.gguf.blocks.packing import pack, require_layout
from exporters.gguf.container.writer import PlannedTensor
from exporters.gguf.placement import Placement
from signround_edge.errors import UserError
from signround_edge.run_directory import RunDirectory

_FLOATS = {"f32": F32, "f16": F16}
_OWN_FLOATS = {torch.float16: F16, torch.bfloat16: BF16}


def plan_tensor(run: RunDirectory, placement: Placement, dtype: str | None, keep_f32: bool = False) -> PlannedTensor:
    """Plan one tensor.

    Args:
        dtype: None packs the codes; "f32" or "f16" stores the dequantized weights of matrices as floats.
        keep_f32: the file's convention is f32 for this float tensor (a template says so).
    Raises:
        UserError: the parameter's grid has no GGUF type.
    """
    shape, hf_name = placement.shape(run), placement.hf_names[0]
    if dtype is None and run.is_quantized(hf_name):
        layout = require_layout(_only_format(run, placement), hf_name)
        ggml_type = layout.ggml_type
        return PlannedTensor(
            placement.gguf_name, ggml_type, shape, ggml_type.nbytes(shape), lambda: _packed(run, placement)
        )
    ggml_type = F32
    if len(shape) > 1 and not keep_f32:
        ggml_type = _FLOATS[dtype] if dtype else _own_float_type(run, hf_name)
    return PlannedTensor(
        placement.gguf_name,
        ggml_type,
        shape,
        ggml_type.nbytes(shape),
        lambda: _floats(run, placement, ggml_type),
    )


def f32_tensor(name: str, values: NDArray[np.float32]) -> PlannedTensor:
    """Values that no parameter of a run holds (rope_freqs, an importance matrix)."""
    return PlannedTensor(name, F32, values.shape, values.nbytes, lambda: iter([values]))


def dequantized(run: RunDirectory, placement: Placement) -> NDArray[np.float32]:
    """The weights as the file should hold them: f32 [rows, values a row].

    A vector is one row; the rows of experts follow one another.
    """
    shape = placement.shape(run)
    weights = np.empty((math.prod(shape[:-1]), shape[-1]), dtype=np.float32)
    start = 0
    for piece in _pieces(run, placement):
        weights[start : start + len(piece)] = piece
        start += len(piece)
    return weights


def iter_dequantized(run: RunDirectory, placement: Placement) -> Iterator[NDArray[np.float32]]:
    """The same, one parameter at a time."""
    for hf_name in placement.hf_names:
        yield dequantized(run, replace(placement, hf_names=(hf_name,)))


def _own_float_type(run: RunDirectory, hf_name: str) -> GgmlType:
    """The type of a matrix that was not quantized: the run's own, so that nothing is rounded."""
    return _OWN_FLOATS.get(run.float_tensor(hf_name).dtype, F32)


def _only_format(run: RunDirectory, placement: Placement) -> str:
    """The grid of a quantized tensor; UserError where experts that are to be one tensor have several."""
    formats = {run.entry(name).format for name in placement.hf_names}
    if len(formats) > 1:
        raise UserError(
            f"{run.path}: the experts of {placement.gguf_name} have several types, and they are one tensor in a GGUF "
            "file; run `quantize` again"
        )
    return str(formats.pop())


def _packed(run: RunDirectory, placement: Placement) -> Iterator[NDArray[Any]]:
    for hf_name in placement.hf_names:
        yield from map(pack, run.quantized_rows(hf_name, placement.rows))


def _floats(run: RunDirectory, placement: Placement, ggml_type: GgmlType) -> Iterator[NDArray[Any]]:
    for weights in _pieces(run, placement):
        yield weights if ggml_type is F32 else _halves(weights, ggml_type, placement.gguf_name)


def _pieces(run: RunDirectory, placement: Placement) -> Iterator[NDArray[np.float32]]:
    """The weights as the file should hold them, some rows at a time."""
    for hf_name in placement.hf_names:
        for weights in run.dequantized_rows(hf_name, placement.rows):
            array: NDArray[np.float32] = weights.numpy()
            if placement.added:
                array = array + np.float32(placement.added)
            yield array if array.ndim > 1 else array[None, :]


def _halves(weights: NDArray[np.float32], ggml_type: GgmlType, name: str) -> NDArray[Any]:
    """Weights as F16 or BF16."""
    if ggml_type is BF16:
        return (weights.view(np.uint32) >> 16).astype(np.uint16)  # exact: the values were bfloat16
    with np.errstate(over="ignore"):
        half = weights.astype(np.float16)
    if not np.isfinite(half).all():
        raise UserError(f"{name} has weights beyond ±65504, which f16 cannot hold; use --dtype f32")
    return half
