"""A model for onnxruntime-genai's builder whose matrices are stand-ins: they cost no memory and say what they are.

Every row of a stand-in repeats one f32 value, and no two rows of the whole model have the same: a counter of bit
patterns that starts at that of 1.0. A matrix of [N, K] is N values seen K times (a stride of 0). Whatever the builder
does with whole rows (stack, cut, reorder, transpose) shows in what it stores; whatever it does with values shows too,
since the result is no stand-in any more. Vectors and tensors of more dimensions carry the run's values.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from exporters.onnx.bindings import Rows
from signround_edge.model.decoder import transformers_model
from signround_edge.run_directory import RunDirectory

_FIRST = 0x3F800000  # the bits of 1.0
_LAST = 0x7F800000  # those of infinity


@dataclass(frozen=True)
class Held:
    """Whole rows of parameters, as a stored matrix has them.

    Attributes:
        parameters: names, each once, in the order of their first rows.
        rows: see `Binding`.
        transposed: the matrix is [K, N].
    """

    parameters: tuple[str, ...]
    rows: Rows
    transposed: bool


class StandIns:
    """Which values stand for which rows of a run's matrices."""

    def __init__(self, run: RunDirectory) -> None:
        self.shapes: dict[str, tuple[int, int]] = {}
        self.starts: list[int] = []
        start = _FIRST
        for name in run.names():
            shape = run.entry(name).shape
            if len(shape) == 2:
                self.shapes[name] = (shape[0], shape[1])
                self.starts.append(start)
                start += shape[0]
        assert start < _LAST, start
        self.names = list(self.shapes)

    def tensor(self, name: str) -> Tensor:
        """The stand-in of a parameter, f32 [N, K], of N values in memory."""
        rows, cols = self.shapes[name]
        start = self.starts[self.names.index(name)]
        return torch.arange(start, start + rows, dtype=torch.int32).view(torch.float32)[:, None].expand(rows, cols)

    def find(self, array: NDArray[np.float32]) -> Held | None:
        """Which rows a stored matrix holds; None for one that is no stack of stand-ins' rows."""
        for transposed in (False, True):
            oriented = array.T if transposed else array
            if same_in_a_row(oriented) and (held := self._decode(oriented, transposed)) is not None:
                return held
        return None

    def _decode(self, array: NDArray[np.float32], transposed: bool) -> Held | None:
        bits = np.ascontiguousarray(array[:, 0]).view(np.int32).tolist()
        runs: list[tuple[str, int, int]] = []  # (parameter, first row, row behind the last)
        for value in bits:
            index = bisect.bisect_right(self.starts, value) - 1
            if index < 0:
                return None
            name, row = self.names[index], value - self.starts[index]
            if row >= self.shapes[name][0] or self.shapes[name][1] != array.shape[1]:
                return None
            if runs and runs[-1][0] == name and runs[-1][2] == row:
                runs[-1] = (name, runs[-1][1], row + 1)
            else:
                runs.append((name, row, row + 1))
        parameters = tuple(dict.fromkeys(name for name, _, _ in runs))
        if runs == [(name, 0, self.shapes[name][0]) for name in parameters]:
            return Held(parameters, (), transposed)
        offsets = dict(zip(parameters, np.cumsum([0, *(self.shapes[p][0] for p in parameters)]).tolist(), strict=False))
        rows = tuple((offsets[name] + start, offsets[name] + stop) for name, start, stop in runs)
        return Held(parameters, rows, transposed)


def same_in_a_row(array: NDArray[np.float32]) -> bool:
    """Whether all values of each row [n, K] are equal."""
    if array.ndim != 2 or 0 in array.shape:
        return False
    if array.strides[1] == 0 or array.shape[1] == 1:
        return True
    # By columns: no temporary of the matrix's size, and the second one ends it where it is no stand-in.
    return all(np.array_equal(array[:, 0], array[:, k]) for k in range(1, array.shape[1]))


def stand_in_model(run: RunDirectory, stand_ins: StandIns) -> nn.Module:
    """transformers' model of a run, with stand-ins for matrices and the run's values for all other tensors."""
    model: Any = transformers_model(run.config_dir)
    tensors = {
        name: stand_ins.tensor(name) if name in stand_ins.shapes else run.dequantized(name) for name in run.names()
    }
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    built: nn.Module = model.requires_grad_(False).eval()
    return built


def without_copies(tensor: Any) -> Any:
    """A stacked matrix of stand-ins as a view of one column again; anything else as it is.

    The builder stacks Q, K and V by `torch.cat`, which is a whole matrix in f32, and keeps it until the graph is saved.
    """
    if not isinstance(tensor, Tensor) or tensor.ndim != 2 or 0 in tensor.stride() or tensor.dtype != torch.float32:
        return tensor
    array = tensor.detach().numpy()
    if same_in_a_row(array):
        return tensor[:, :1].clone().expand_as(tensor)
    if same_in_a_row(array.T):
        return tensor[:1].clone().expand_as(tensor)
    return tensor
