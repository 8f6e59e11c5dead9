"""Reading a GGUF artifact for `inspect` and `verify`: its tensors, its metadata, and what they should hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from exporters.gguf.blocks.ggml_types import F16, GgmlType
from exporters.gguf.container.reader import MMPROJ, GgufFile
from exporters.gguf.families.row_orders import RowOrder
from exporters.gguf.families.table import canonical_config, family_of
from exporters.gguf.placement import Placement, builtin_placements, names_of
from exporters.gguf.provenance import PROVENANCE
from exporters.gguf.routes.template import match_by_value
from exporters.gguf.tensors import dequantized
from signround_edge.errors import CheckFailed, UserError
from signround_edge.run_directory import RunDirectory


class TensorRow(NamedTuple):
    """One tensor of a file: `type` is ggml's name ("Q4_0"), `shape` has rows first, `bytes` is the stored size."""

    name: str
    type: str
    shape: tuple[int, ...]
    bytes: int


class MappedTensor(NamedTuple):
    """A parameter of a run and its tensor in the file; stored row i is the parameter's row rows[i] (None: same).

    The experts of a layer have one tensor: it has the rows of the first, then those of the second, and so on.
    """

    hf_name: str
    gguf_name: str
    rows: RowOrder | None


class ExpectedTensor(NamedTuple):
    """What a tensor of the file should hold: `weights()` is f32 [rows, values a row] (a vector is one row)."""

    gguf_name: str
    weights: Callable[[], NDArray[np.float32]]


def read_tensors(path: Path) -> list[TensorRow]:
    """The tensors of a GGUF file in their order. UserError when it is missing, not GGUF, damaged or truncated."""
    return [TensorRow(t.name, t.ggml_type.name, t.shape, t.nbytes) for t in GgufFile.open(path).tensors.values()]


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata of a GGUF file as Python values (arrays as lists). UserError as for `read_tensors`."""
    return {key: entry.value for key, entry in GgufFile.open(path).metadata.items()}


def name_map(run: RunDirectory, artifact: Path) -> list[MappedTensor]:
    """Each parameter of the run with its tensor in the file.

    Raises:
        UserError: the file is unreadable.
        CheckFailed: the file lacks a tensor for a parameter: it is not this run's, or not whole.
    """
    placements = _placements(run, GgufFile.open(artifact))
    return [MappedTensor(piece.hf_name, p.gguf_name, piece.rows) for p in placements for piece in p.pieces]


def iter_expected(run: RunDirectory, artifact: Path) -> Iterator[ExpectedTensor]:
    """What each tensor of the file that stems from the run should hold, in the file's orientation and order of rows.

    For tensors stored as F16 (`--dtype f16`, or codes that cannot follow) that is the run's weight rounded to fp16; for
    all others the weight as it is, bit for bit. Raises as `name_map`.
    """
    file = GgufFile.open(artifact)
    for placement in _placements(run, file):
        ggml_type = file.tensors[placement.gguf_name].ggml_type
        yield ExpectedTensor(placement.gguf_name, _expected(run, placement, ggml_type))


def _expected(run: RunDirectory, placement: Placement, ggml_type: GgmlType) -> Callable[[], NDArray[np.float32]]:
    def weights() -> NDArray[np.float32]:
        exact = dequantized(run, placement)
        if ggml_type is not F16:
            return exact
        return exact.astype(np.float16).astype(np.float32)

    return weights


def _placements(run: RunDirectory, file: GgufFile) -> list[Placement]:
    if file.architecture == MMPROJ:
        raise UserError(
            f"{file.path} is an mmproj file: it holds the towers for images and sound as they were, and nothing of the "
            "run; give the text model's file"
        )
    placements = None
    if file.get(f"{PROVENANCE}.template") is None:  # a converter may order rows otherwise than the built-in route
        with suppress(UserError):  # a file from before that key, of a model that the built-in route refuses
            config = canonical_config(run.config)
            if file.architecture == family_of(config).name:
                placements = builtin_placements(run, config)
    if placements is None:
        placements = match_by_value(run, file)
    absent = set(run.names()) - names_of(p for p in placements if p.gguf_name in file.tensors)
    if absent:
        raise CheckFailed(
            f"{file.path} has no tensor for {len(absent)} of the run's parameters (for example {min(absent)}); "
            "it was not exported from this run"
        )
    return placements
