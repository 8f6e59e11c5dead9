"""Where each parameter of a run lies in a GGUF file: its name there and the order of its rows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from exporters.gguf.families.family import family_of, row_order
from exporters.gguf.families.row_orders import Config, RowOrder
from signround_edge.errors import UserError
from signround_edge.formats import QuantizedTensor
from signround_edge.model.experts import stacks
from signround_edge.run_directory import RunDirectory
from signround_edge.schemes.gguf_names import name_table

_SUFFIXES = (".weight", ".bias")
_VALUES_AT_ONCE = 1 << 22  # 16 MB as f32: larger temporaries are mapped anew each time, which doubles the time


@dataclass(frozen=True)
class Placement:
    """One tensor of the file, made of one parameter of the run, or of one matrix of each expert of a layer.

    Attributes:
        gguf_name: the tensor's name in the file.
        hf_names: the parameter's name in the run (for tied parameters: the one that holds the data); several are
            experts, stacked in this order.
        rows: stored row i is the parameter's row rows[i]; None when the order is the same.
        added: a constant that the file's convention adds (Gemma stores 1 + norm weight).
    """

    gguf_name: str
    hf_names: tuple[str, ...]
    rows: RowOrder | None = None
    added: float = 0.0

    def shape(self, run: RunDirectory) -> tuple[int, ...]:
        """Shape of the tensor, rows first: [n], [rows, values a row] or [experts, rows, values a row]."""
        one = matrix_shape(run, self.hf_names[0])
        return one if len(self.hf_names) == 1 else (len(self.hf_names), *one)


def builtin_placements(run: RunDirectory, config: Config) -> list[Placement]:
    """Placement of every parameter, for the built-in families. UserError when one has no place.

    Args:
        config: as `canonical_config` gives it.
    """
    family = family_of(config)
    names = name_table(family.arch, int(config["num_hidden_layers"]))
    placements = []
    for stack, hf_names in stacks(run.names()).items():
        hf_name = hf_names[0]
        spellings = (names.get_name(spelling, try_suffixes=_SUFFIXES) for spelling in _spellings(stack))
        gguf_name = next(filter(None, spellings), None)
        if gguf_name is None or hf_name.endswith(family.without):
            raise UserError(
                f"parameter {hf_name} has no place in llama.cpp's {family.model_type} architecture; make an f16 GGUF "
                "with llama.cpp's convert_hf_to_gguf.py and give it as --template"
            )
        rows = row_order(family, config, hf_name, matrix_shape(run, hf_name)[0])
        added = family.norm_added if hf_name.endswith("norm.weight") else 0.0
        placements.append(Placement(gguf_name, tuple(hf_names), rows, added))
    return placements


def candidate_names(run: RunDirectory, block_count: int, arch: str) -> dict[str, tuple[str, ...]]:
    """GGUF name → HF names (see `Placement`) that a template of architecture `arch` may use, tied ones included."""
    archs = [known for known, name in gguf.MODEL_ARCH_NAMES.items() if name == arch]
    maps = [name_table(known, block_count) for known in archs]
    found: dict[str, tuple[str, ...]] = {}
    for stack, data_names in _with_tied(run):
        for names in maps:
            for spelling in _spellings(stack):
                gguf_name = names.get_name(spelling, try_suffixes=_SUFFIXES)
                if gguf_name is not None:
                    found.setdefault(gguf_name, data_names)
    return found


def matrix_shape(run: RunDirectory, hf_name: str) -> tuple[int, ...]:
    """Shape in the file's orientation: [out, in] for matrices, [n] for vectors."""
    return run.entry(hf_name).out_in_shape


def float_data(run: RunDirectory, hf_name: str) -> Tensor:
    """A float parameter in the file's orientation, in its own dtype."""
    tensor = run.float_tensor(hf_name)
    return tensor.T.contiguous() if run.entry(hf_name).transposed else tensor


def dequantized_rows(run: RunDirectory, placement: Placement) -> NDArray[np.float32]:
    """The weights as the file should hold them: f32 [rows, values a row].

    A vector is one row; the rows of experts follow one another.
    """
    shape = placement.shape(run)
    weights = np.empty((math.prod(shape[:-1]), shape[-1]), dtype=np.float32)
    start = 0
    for piece in dequantized_pieces(run, placement):
        weights[start : start + len(piece)] = piece
        start += len(piece)
    return weights


def iter_dequantized(run: RunDirectory, placement: Placement) -> Iterator[NDArray[np.float32]]:
    """The same, one parameter at a time."""
    for hf_name in placement.hf_names:
        yield dequantized_rows(run, replace(placement, hf_names=(hf_name,)))


def dequantized_pieces(run: RunDirectory, placement: Placement) -> Iterator[NDArray[np.float32]]:
    """The same, some rows at a time: of a large embedding the f32 weights would not fit into memory."""
    for name in placement.hf_names:
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


def _with_tied(run: RunDirectory) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(name, names of the parameters that hold its data); for experts, the name without a number."""
    yield from ((stack, tuple(names)) for stack, names in stacks(run.names()).items())
    yield from ((name, (owner,)) for name, owner in run.manifest.tied.items())


def _spellings(hf_name: str) -> list[str]:
    """The name itself, and as base models (without a head on top) spell it."""
    known = ("model.", "transformer.", "gpt_neox.", "language_model.")
    bare = next((hf_name.removeprefix(prefix) for prefix in known if hf_name.startswith(prefix)), hf_name)
    return list(dict.fromkeys([hf_name, bare, f"model.{bare}", f"transformer.{bare}"]))
