"""Find the first layer of a runtime's graph that does not compute what torch computes.

Graphs name their tensors as they like, and fuse what they like. So torch's hidden states are looked for by value: a
layer is right when some tensor inside the runtime's graph equals its output. In floats a right layer agrees to some
1e-6, far below what any mistake in the graph costs; perplexity and KL divergence of a few windows do not see them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from runtime_tests.checks.torch_points import Point
from signround_edge.evaluation.metrics import FloatArray, TokenArray

TOKENS = 48  # enough for attention to matter, few enough to hold every tensor of the graph

_QUIET = np.errstate(all="ignore")  # a broken graph's hidden states may be NaN or infinite


@runtime_checkable
class ShowsHiddenStates(Protocol):
    """A session that may show the tensors inside its graph."""

    @property
    def shows_hidden_states(self) -> bool:
        """Whether it does: an engine behind a worker may not."""
        ...

    def hidden_states(self, tokens: TokenArray, width: int) -> dict[str, FloatArray]:
        """Every float tensor [n, width] that the graph computes for int32 [n], by the graph's own name."""
        ...


@dataclass(frozen=True)
class LayerError:
    """How far a layer's output is from torch's: the root mean square over tokens of ‖x − y‖ / ‖y‖."""

    name: str
    error: float


@dataclass(frozen=True)
class Divergence:
    """Where a graph leaves torch.

    Attributes:
        layers: every layer in order, with its error.
        first: the first layer that is off; None when all agree, so that only the output head can be.
        last_agreeing: the last place before that (a layer, or a module inside the block) that agrees; None: nothing.
        tolerance: the error up to which a layer agrees.
    """

    layers: list[LayerError]
    first: LayerError | None
    last_agreeing: str | None
    tolerance: float

    @property
    def largest_error(self) -> float:
        """Of all layers."""
        return max((layer.error for layer in self.layers), default=0.0)

    def sentence(self) -> str:
        """For a report."""
        if self.first is None:
            return "in floats every layer's hidden states are torch's, so the output head or the packed kernels are off"
        since = (
            f"the last place that agrees is {self.last_agreeing}" if self.last_agreeing else "nothing before it agrees"
        )
        return f"{self.first.name} is the first layer that is off (by {self.first.error:.2g} of its size; {since})"

    def to_json(self) -> dict[str, Any]:
        """For the certificate."""
        return {
            "first_layer": None if self.first is None else self.first.name,
            "last_agreeing": self.last_agreeing,
            "tolerance": self.tolerance,
            "layers": [{"name": e.name, "error": e.error if np.isfinite(e.error) else None} for e in self.layers],
        }


def locate(session: ShowsHiddenStates, tokens: TokenArray, points: Sequence[Point], tolerance: float) -> Divergence:
    """Compare a graph's hidden states with torch's.

    Args:
        session: the graph, computing in floats.
        tokens: int32 [n]; the same that `points` were made with.
        points: torch's hidden states, in order.
        tolerance: the error up to which a layer agrees.
    Raises:
        UserError: the runtime cannot run or show the graph.
    """
    found = list(session.hidden_states(tokens, points[0].states.shape[1]).values())
    stacked = np.array([states[-1] for states in found], dtype=np.float32)
    layers: list[LayerError] = []
    agreeing: str | None = None
    for point in points:
        error = LayerError(point.name, _smallest_error(found, stacked, point.states))
        if point.is_layer:
            layers.append(error)
            if not error.error <= tolerance:
                rest = [p for p in points[points.index(point) + 1 :] if p.is_layer]
                layers += [LayerError(p.name, _smallest_error(found, stacked, p.states)) for p in rest]
                return Divergence(layers, error, agreeing, tolerance)
        if error.error <= tolerance:
            agreeing = point.name
    return Divergence(layers, None, agreeing, tolerance)


@_QUIET
def _smallest_error(found: Sequence[FloatArray], last_rows: FloatArray, states: FloatArray) -> float:
    """The error of the tensor that comes nearest; chosen by its last token, which sees the whole window."""
    if not found:
        return float("inf")
    distances = np.linalg.norm(last_rows - states[-1], axis=1)
    best = found[int(np.argmin(np.where(np.isfinite(distances), distances, np.inf)))]
    errors, sizes = np.linalg.norm(best - states, axis=1), np.linalg.norm(states, axis=1)
    # A row of zeros, the embedding of a padding token say, is right where the runtime's is zeros too.
    relative = np.where((errors == 0) & (sizes == 0), 0, errors / sizes)
    return float(np.sqrt(np.mean(np.square(relative))))
