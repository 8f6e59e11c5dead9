"""From a run's parameters to the tensors of a GGUF file: which type each gets, and its bytes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from exporters.gguf.blocks.ggml_types import BF16, F16, F32, Q4_0, GgmlType
from exporters.gguf.blocks.packing import pack, require_layout
from exporters.gguf.container.writer import PlannedTensor
from exporters.gguf.placement import Placement
from exporters.interface import ExportOptions
from signround_edge.errors import UserError
from signround_edge.formats import get_grid
from signround_edge.run_directory import RunDirectory

_FLOATS = {"f32": F32, "f16": F16}
_OWN_FLOATS = {torch.float16: F16, torch.bfloat16: BF16}
_STORED_FLOATS = {**_OWN_FLOATS, torch.float32: F32}
_F16_EXPONENT = np.int16(0x7C00)  # all of its bits: infinity or NaN


def plan_tensor(run: RunDirectory, placement: Placement, dtype: str | None, keep_f32: bool = False) -> PlannedTensor:
    """Plan one tensor.

    Args:
        dtype: None packs the codes; "f32" or "f16" stores the dequantized weights of matrices as floats. A matrix whose
            codes cannot follow its placement (`codes_follow`) is stored as f16 then.
        keep_f32: the file's convention is f32 for this float tensor (a template says so).
    Raises:
        UserError: the parameter's grid has no GGUF type.
    """
    name, shape, hf_name = placement.gguf_name, placement.shape, placement.pieces[0].hf_name
    if dtype is None and codes_follow(run, placement):
        ggml_type = require_layout(_only_format(run, placement), hf_name).ggml_type
        return PlannedTensor(name, ggml_type, shape, ggml_type.nbytes(shape), lambda: _packed(run, placement))
    ggml_type = F32
    if len(shape) > 1 and not keep_f32:
        rounded = F16 if run.is_quantized(hf_name) else _own_float_type(run, hf_name)
        ggml_type = _FLOATS[dtype] if dtype else rounded
    return PlannedTensor(name, ggml_type, shape, ggml_type.nbytes(shape), lambda: _floats(run, placement, ggml_type))


def codes_follow(run: RunDirectory, placement: Placement) -> bool:
    """Whether the tensor can hold codes: its parameters are quantized, and only rows or whole blocks move."""
    if not all(run.is_quantized(name) for name in placement.hf_names):
        return False
    if placement.function is not None or placement.transposed:
        return False
    if placement.columns is None:
        return True
    columns = torch.from_numpy(placement.columns)
    formats = {run.entry(name).format for name in placement.hf_names}
    return all(get_grid(str(name)).unit_order(columns) is not None for name in formats)


def say_floats(run: RunDirectory, placements: Iterable[Placement], options: ExportOptions) -> None:
    """Log which quantized parameters the file holds as f16, because their codes cannot follow."""
    unable = [p for p in placements if options.dtype is None and not codes_follow(run, p)]
    names = [name for p in unable for name in p.hf_names if run.is_quantized(name)]
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        options.log(
            f"{', '.join(names[:3])}{more}: llama.cpp stores their values in another order, in which the blocks of the "
            "type do not stay whole, so the file has these weights as f16"
        )


def f32_tensor(name: str, values: NDArray[np.float32]) -> PlannedTensor:
    """Values that no parameter of a run holds (rope_freqs, an importance matrix)."""
    return PlannedTensor(name, F32, values.shape, values.nbytes, lambda: iter([values]))


def zeros(name: str, shape: tuple[int, ...]) -> PlannedTensor:
    """A tensor of zeros, in a type of few bytes where its rows allow that."""
    ggml_type = Q4_0 if len(shape) > 1 and shape[-1] % Q4_0.block_values == 0 else F32
    nbytes = ggml_type.nbytes(shape)
    return PlannedTensor(name, ggml_type, shape, nbytes, lambda: iter([np.zeros(nbytes, dtype=np.uint8)]))


def dequantized(run: RunDirectory, placement: Placement) -> NDArray[np.float32]:
    """The weights as the file should hold them: f32 [rows, values a row].

    A vector is one row; the rows of several matrices follow one another.
    """
    shape = placement.shape
    weights = np.empty(math.prod(shape), dtype=np.float32)
    start = 0
    for piece in _pieces(run, placement):
        weights[start : start + piece.size] = piece.reshape(-1)
        start += piece.size
    return weights.reshape(-1, shape[-1])


def _own_float_type(run: RunDirectory, hf_name: str) -> GgmlType:
    """The type of a matrix that was not quantized: the run's own, so that nothing is rounded."""
    return _OWN_FLOATS.get(run.float_tensor(hf_name).dtype, F32)


def _only_format(run: RunDirectory, placement: Placement) -> str:
    """The grid of a quantized tensor; UserError where parameters that are to be one tensor have several."""
    formats = {run.entry(name).format for name in placement.hf_names}
    if len(formats) > 1:
        raise UserError(
            f"{run.path}: the matrices of {placement.gguf_name} have several types, and they are one tensor in a GGUF "
            "file; run `quantize` again, with one --tensor-type for all of them"
        )
    return str(formats.pop())


def _packed(run: RunDirectory, placement: Placement) -> Iterator[NDArray[Any]]:
    columns = None if placement.columns is None else torch.from_numpy(placement.columns)
    for piece in placement.pieces:
        for rows in run.quantized_rows(piece.hf_name, piece.rows):
            yield pack(rows if columns is None else rows.take_columns(columns))


def _floats(run: RunDirectory, placement: Placement, ggml_type: GgmlType) -> Iterator[NDArray[Any]]:
    if _is_as_stored(run, placement, ggml_type):
        for piece in placement.pieces:
            for rows in run.float_rows(piece.hf_name, piece.rows):
                yield _checked(rows, placement.gguf_name)
        return
    for weights in _pieces(run, placement):
        yield weights if ggml_type is F32 else _halves(weights, ggml_type, placement.gguf_name)


def _is_as_stored(run: RunDirectory, placement: Placement, ggml_type: GgmlType) -> bool:
    """Whether the run holds these very floats, so that only rows move."""
    if placement.transposed or placement.columns is not None or placement.function is not None:
        return False
    if any(run.is_quantized(name) for name in placement.hf_names):
        return False
    return all(_STORED_FLOATS.get(run.float_tensor(name).dtype) is ggml_type for name in placement.hf_names)


def _pieces(run: RunDirectory, placement: Placement) -> Iterator[NDArray[np.float32]]:
    """The weights as the file should hold them, some of its values at a time."""
    if placement.transposed:
        yield from _transposed(run, placement)
        return
    for piece in placement.pieces:
        for weights in run.dequantized_rows(piece.hf_name, piece.rows):
            if placement.function is not None:
                weights = placement.function.of(weights)
            if placement.columns is not None:
                weights = weights[..., torch.from_numpy(placement.columns)]
            yield np.ascontiguousarray(weights.numpy())


def _transposed(run: RunDirectory, placement: Placement) -> Iterator[NDArray[np.float32]]:
    """All matrices at once: llama.cpp transposes small ones only."""
    rows = torch.cat([rows for p in placement.pieces for rows in run.dequantized_rows(p.hf_name, p.rows)])
    count, inputs, outputs = placement.shape
    yield np.ascontiguousarray(rows.reshape(count, outputs, inputs).transpose(1, 2).numpy())


def _halves(weights: NDArray[np.float32], ggml_type: GgmlType, name: str) -> NDArray[Any]:
    """Weights as F16 or BF16."""
    if ggml_type is BF16:
        return (weights.view(np.uint32) >> 16).astype(np.uint16)  # exact: the values were bfloat16
    return _checked(torch.from_numpy(weights).to(torch.float16), name)  # numpy's takes six times as long


def _checked(floats: Tensor, name: str) -> NDArray[Any]:
    """The bits of floats; UserError where f16 holds infinity or NaN."""
    bits = floats.contiguous().view(torch.int16 if floats.element_size() == 2 else torch.int32).numpy()
    if floats.dtype == torch.float16 and bool(((bits & _F16_EXPONENT) == _F16_EXPONENT).any()):
        raise UserError(f"{name} has weights beyond ±65504, which f16 cannot hold; use --dtype f32")
    return bits
