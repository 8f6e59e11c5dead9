"""A run directory as `quantize` would leave it, but for its codes, which are all zero: exporters tell its size.

Where its weights are asked for in floats, they are the original model's, by which a graph or a template is recognised.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from signround_edge.formats import QuantizedTensor, get_grid
from signround_edge.manifest import Manifest, TensorEntry
from signround_edge.model.source import model_name
from signround_edge.model.weights import ModelWeights
from signround_edge.run_directory import RunDirectory
from signround_edge.schemes.plan import Plan
from signround_edge.tuning.resume import create


class UntunedRun(RunDirectory):
    """Floats are the model's; nothing is stored but manifest and config."""

    def __init__(self, path: Path, manifest: Manifest, weights: ModelWeights) -> None:
        super().__init__(path, manifest)
        self._weights = weights

    def _stored(self, name: str) -> QuantizedTensor:
        entry = self.entry(name)
        grid = get_grid(str(entry.format))
        rows, cols = entry.out_in_shape
        fields = {f: torch.zeros(shape, dtype=dtype) for f, (shape, dtype) in grid.field_shapes(rows, cols).items()}
        return QuantizedTensor(grid, torch.zeros(rows, cols, dtype=grid.code_dtype), fields)

    def float_tensor(self, name: str) -> Tensor:
        return self._weights.tensor(name)

    def dequantized(self, name: str) -> Tensor:
        return self._weights.tensor(name).float()

    def dequantized_rows(self, name: str, order: NDArray[np.intp] | None = None) -> Iterator[Tensor]:
        weight = self.dequantized(name)
        weight = weight.T.contiguous() if self.entry(name).transposed else weight
        yield weight if order is None else weight[torch.from_numpy(order)]

    def with_types(self, types: Mapping[str, str | None]) -> UntunedRun:
        """The same with other types: parameter name → type, or None for floats, for those that change."""
        entries = [_with_type(entry, types.get(entry.name, entry.format)) for entry in self.manifest.tensors]
        manifest = Manifest(**{**vars(self.manifest), "tensors": entries})
        return UntunedRun(self.path, manifest, self._weights)


def untuned_run(weights: ModelWeights, plan: Plan, scheme: str, files: dict[str, str], folder: Path) -> UntunedRun:
    """A run of a plan, in a folder that is new.

    Args:
        scheme: its text, as the manifest will have it.
        files: file name → sha256 of the model's files.
    """
    inside = {} if weights.outer_type is None else {"inside": weights.outer_type}
    manifest = Manifest(
        scheme=scheme,
        targets=[plan.target],
        source={"model": model_name(weights.source.path), "files": files, **inside},
        settings={},
        versions={},
        parts=plan.parts,
        tied=plan.tied,
        tensors=plan.tensors,
    )
    made = create(folder, manifest, weights)
    return UntunedRun(made.path, manifest, weights)


def _with_type(entry: TensorEntry, kind: str | None) -> TensorEntry:
    return TensorEntry(**{**vars(entry), "format": kind})
