"""Where each parameter of a run lies in a GGUF file: its name there and the order of its rows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from exporters.gguf.families import family_of, row_order
from exporters.gguf.row_orders import Config, RowOrder
from signround_edge.errors import UserError
from signround_edge.formats import QuantizedTensor
from signround_edge.gguf_names import name_table
from signround_edge.run_directory import RunDirectory

_SUFFIXES = (".weight", ".bias")
_VALUES_AT_ONCE = 1 << 22  # 16 MB as f32: larger temporaries are mapped anew each time, which doubles the time


@dataclass(frozen=True)
class Placement:
    """One tensor of the file, made of one parameter of the run.

    Attributes:
        gguf_name: the tensor's name in the file.
        hf_name: the parameter's name in the run (for tied parameters: the one that holds the data).
        rows: stored row i is the parameter's row rows[i]; None when the order is the same.
        added: a constant that the file's convention adds (Gemma stores 1 + norm weight).
    """

    gguf_name: str
    hf_name: str
    rows: RowOrder | None = None
    added: float = 0.0


def builtin_placements(run: RunDirectory, config: Config) -> list[Placement]:
    """Placement of every parameter, for the built-in families. UserError when one has no place.

    Args:
        config: as `canonical_config` gives it.
    """
    family = family_of(config)
    names = name_table(family.arch, int(config["num_hidden_layers"]))
    placements = []
    for hf_name in run.names():
        spellings = (names.get_name(spelling, try_suffixes=_SUFFIXES) for spelling in _spellings(hf_name))
        gguf_name = next(filter(None, spellings), None)
        if gguf_name is None or hf_name.endswith(family.without):
            raise UserError(
                f"parameter {hf_name} has no place in llama.cpp's {family.model_type} architecture; make an f16 GGUF "
                "with llama.cpp's convert_hf_to_gguf.py and give it as --template"
            )
        rows = row_order(family, config, hf_name, matrix_shape(run, hf_name)[0])
        added = family.norm_added if hf_name.endswith("norm.weight") else 0.0
        placements.append(Placement(gguf_name, hf_name, rows, added))
    return placements


def candidate_names(run: RunDirectory, block_count: int, arch: str) -> dict[str, str]:
    """GGUF name → HF name that a template of architecture `arch` may use, tied parameters included."""
    archs = [known for known, name in gguf.MODEL_ARCH_NAMES.items() if name == arch]
    maps = [name_table(known, block_count) for known in archs]
    found: dict[str, str] = {}
    for hf_name, data_name in _with_tied(run):
        for names in maps:
            for spelling in _spellings(hf_name):
                gguf_name = names.get_name(spelling, try_suffixes=_SUFFIXES)
                if gguf_name is not None:
                    found.setdefault(gguf_name, data_name)
    return found


def matrix_shape(run: RunDirectory, hf_name: str) -> tuple[int, ...]:
    """Shape in the file's orientation: [out, in] for matrices, [n] for vectors."""
    entry = run.entry(hf_name)
    return tuple(entry.shape[::-1] if entry.transposed else entry.shape)


def float_data(run: RunDirectory, hf_name: str) -> Tensor:
    """A float parameter in the file's orientation, in its own dtype."""
    tensor = run.float_tensor(hf_name)
    return tensor.T.contiguous() if run.entry(hf_name).transposed else tensor


def dequantized_rows(run: RunDirectory, placement: Placement) -> NDArray[np.float32]:
    """The weights as the file should hold them: f32 [rows, values a row] (a vector is one row)."""
    return np.concatenate(list(dequantized_pieces(run, placement)))


def dequantized_pieces(run: RunDirectory, placement: Placement) -> Iterator[NDArray[np.float32]]:
    """The same, some rows at a time: of a large embedding the f32 weights would not fit into memory."""
    name = placement.hf_name
    stored: QuantizedTensor | Tensor = run.quantized(name) if run.is_quantized(name) else float_data(run, name)
    for rows in row_groups(tuple(stored.shape), placement.rows):
        if isinstance(stored, QuantizedTensor):
            weights = stored.take_rows(rows).dequantize()
        else:
            weights = stored[rows].to(torch.float32)
        array: NDArray[np.float32] = weights.numpy()
        if placement.added:
            array = array + np.float32(placement.added)
        yield array if array.ndim > 1 else array[None, :]


def row_groups(shape: tuple[int, ...], order: RowOrder | None) -> Iterator[slice | Tensor]:
    """Indices of the rows of a matrix in the file's order, in groups of some million values; a vector is one."""
    step = _VALUES_AT_ONCE // math.prod(shape[1:]) if len(shape) > 1 else shape[0]
    for start in range(0, shape[0], max(1, step)):
        group = slice(start, start + max(1, step))
        yield group if order is None else torch.from_numpy(order[group])


def _with_tied(run: RunDirectory) -> Iterable[tuple[str, str]]:
    """(name, name of the parameter that holds its data)."""
    yield from ((name, name) for name in run.names())
    yield from run.manifest.tied.items()


def _spellings(hf_name: str) -> list[str]:
    """The name itself, and as base models (without a head on top) spell it."""
    known = ("model.", "transformer.", "gpt_neox.", "language_model.")
    bare = next((hf_name.removeprefix(prefix) for prefix in known if hf_name.startswith(prefix)), hf_name)
    return list(dict.fromkeys([hf_name, bare, f"model.{bare}", f"transformer.{bare}"]))
