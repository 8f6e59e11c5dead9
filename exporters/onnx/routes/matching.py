"""Recognising the run's parameters in a graph that names them otherwise: by shape, orientation and value.

Two cases, one procedure. A graph traced from the run's own weights holds them exactly. Someone's float graph of the
original model holds what they were before rounding and tuning: there the relative error ‖W − Ŵ‖/‖W‖ of the right
parameter is well below 0.5, and that of any other one about 1.4. Names only decide between equals.

A sample of each parameter (at most 64 × 64 values, evenly spaced) serves the search, so that memory stays small and
time linear; the parameter that is found is then compared as a whole.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from exporters.onnx.bindings import Binding
from exporters.onnx.passes.weight_uses import float_initializers, weight_uses
from exporters.onnx.run_weights import RunWeights

FloatArray = NDArray[np.float32]

NEAR = 0.5  # relative error from which two tensors are not the same any more
_CLEAR = 2.0  # how many times nearer than the next one a match must be
_COPY_ERROR = 1e-3  # two stored copies of one tensor may differ by so much (one of them in f16)
_SAMPLED = 64  # rows and columns of a sample


@dataclass
class Matches:
    """What a graph holds of a run.

    Attributes:
        bindings: one for every initializer that holds parameters (float ones, as the graph has them).
        ambiguous: parameter without a place → how many others fit the same initializer as well as it does.
    """

    bindings: list[Binding]
    ambiguous: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Found:
    parameter: str
    transposed: bool
    error: float


def match_weights(
    graph: ir.Graph, weights: RunWeights, limit: float, elsewhere: frozenset[str] = frozenset()
) -> Matches:
    """Find the run's parameters among the f32 and f16 tensors that the graph stores.

    Also found: matrices stacked in rows (a packed QKV projection), and parameters of equal values that the graph keeps
    once (torch.onnx.export merges the biases of an untrained model).

    Args:
        graph: the float graph.
        weights: the run's parameters.
        limit: the largest relative error of a match; 0 asks for equality.
        elsewhere: parameters that are not among those tensors.
    """
    names = [name for name in weights.run.names() if name not in elsewhere]
    samples = {name: sample(weights.run.dequantized(name).numpy()) for name in names}
    by_shape: dict[tuple[int, ...], list[str]] = {}
    for name in samples:
        by_shape.setdefault(tuple(weights.run.entry(name).shape), []).append(name)
    stacks = {s: (names, np.stack([samples[n] for n in names])) for s, names in by_shape.items()}
    stored = {n: v for n, v in float_initializers(graph).items() if v.uses()}
    found: dict[str, _Found] = {}
    ambiguous: dict[str, int] = {}
    for name, value in stored.items():
        array = _array(value)
        candidates = _candidates(array, stacks)
        best, rivals = _choose(name, candidates, limit)
        if best is None:
            ambiguous |= {r.parameter: len(rivals) - 1 for r in rivals}
        elif _error(_oriented(array, best.transposed), _whole(weights, best.parameter)) <= limit:
            found[name] = best
    _drop_chance_matches(found)
    bindings = [_binding(stored[n], (f.parameter,), f.transposed) for n, f in found.items()]
    missing = [p for p in samples if p not in {f.parameter for f in found.values()}]
    for name, value in stored.items():
        if name not in found and (stack := _match_stack(value, missing, samples, weights, limit)):
            bindings.append(stack)
            missing = [p for p in missing if p not in stack.parameters]
    bindings = _with_duplicates(bindings, missing, samples, weights)
    return Matches(bindings, {p: n for p, n in ambiguous.items() if p in missing})


def sample(array: FloatArray) -> FloatArray:
    """At most 64 × 64 evenly spaced values of a matrix, or 4,096 of a vector, as f32; shapes decide which.

    Of more dimensions (the kernel of a convolution) all but the first count as one.
    """
    if array.ndim > 2:
        array = array.reshape(len(array), -1)
    if array.ndim == 1:
        return array[_positions(len(array), _SAMPLED * _SAMPLED)].astype(np.float32)
    rows, cols = (_positions(n, _SAMPLED) for n in array.shape)
    return array[np.ix_(rows, cols)].astype(np.float32)


def _positions(count: int, at_most: int) -> NDArray[np.int64]:
    return np.linspace(0, count - 1, min(count, at_most)).astype(np.int64)


def _errors(theirs: FloatArray, ours: FloatArray) -> FloatArray:
    """‖theirs − one‖/‖theirs‖ for each one of `ours` [n, *shape]; 0 for two zero tensors, infinite beside one."""
    differences = np.linalg.norm((ours - theirs).reshape(len(ours), -1), axis=1)
    size = np.linalg.norm(theirs.reshape(-1))
    return differences / size if size else np.where(differences == 0, np.float32(0), np.float32(np.inf))


def _error(theirs: FloatArray, ours: FloatArray) -> float:
    return float(_errors(theirs, ours[None])[0])


def _candidates(array: FloatArray, stacks: dict[tuple[int, ...], tuple[list[str], FloatArray]]) -> list[_Found]:
    """Every parameter of that shape, in either orientation, and how far its sample is.

    Args:
        array: a stored tensor.
        stacks: shape → names of the parameters, and their samples stacked along the first axis.
    """
    found = []
    for transposed in _orientations(array):
        theirs = _oriented(array, transposed)
        if theirs.shape in stacks:
            names, ours = stacks[theirs.shape]
            errors = _errors(sample(theirs), ours).tolist()
            found += [_Found(n, transposed, e) for n, e in zip(names, errors, strict=True)]
    return found


def _choose(initializer: str, candidates: list[_Found], limit: float) -> tuple[_Found | None, list[_Found]]:
    """The match and the candidates that are as near as it; (None, …) when there is none, or no way to decide."""
    near = sorted((c for c in candidates if c.error <= limit), key=lambda c: c.error)
    if not near:
        return None, []
    nearest = near[0].error
    rivals = [c for c in candidates if c.error <= min(limit, _CLEAR * nearest)]
    # Rivals beyond the limit count too: 0.45 beside 0.6 is no clear match.
    unclear = [c for c in candidates if c.error < _CLEAR * nearest or c.error == nearest]
    if len(unclear) == 1:
        return near[0], rivals
    alike = [likeness(initializer, c.parameter) for c in unclear]
    first = unclear[int(np.argmax(alike))]
    if first.error <= limit and (alike.count(max(alike)) == 1 or all(c.error == 0 for c in unclear)):
        return first, rivals
    return None, unclear


def likeness(initializer: str, parameter: str) -> float:
    """Shared words of two names over all of them, between 0 and 1."""
    ours, theirs = ({w for w in re.split(r"[^a-z0-9]+", n.lower()) if w} for n in (parameter, initializer))
    return len(ours & theirs) / len(ours | theirs)


def _drop_chance_matches(found: dict[str, _Found]) -> None:
    """Of several initializers that hold one parameter keep copies only: a constant of ones looks like many a norm."""
    nearest: dict[str, float] = {}
    for match in found.values():
        nearest[match.parameter] = min(match.error, nearest.get(match.parameter, match.error))
    for name, match in list(found.items()):
        if match.error > nearest[match.parameter] + _COPY_ERROR:
            del found[name]


def _match_stack(
    value: ir.Value, missing: list[str], samples: dict[str, FloatArray], weights: RunWeights, limit: float
) -> Binding | None:
    """The parameters without a place whose rows, one after the other, are this initializer; None when they are not."""
    entries = {p: weights.run.entry(p) for p in missing if not weights.run.entry(p).transposed}
    for transposed in _orientations(_array(value)):
        array = _oriented(_array(value), transposed)
        parts: list[str] = []
        row = 0
        while row < len(array):
            candidates = [
                _Found(p, transposed, _error(sample(array[row : row + e.shape[0]]), samples[p]))
                for p, e in entries.items()
                if p not in parts and tuple(e.shape[1:]) == array.shape[1:] and row + e.shape[0] <= len(array)
            ]
            best, _ = _choose(value.name or "", candidates, limit)
            if best is None:
                break
            parts.append(best.parameter)
            row += entries[best.parameter].shape[0]
        if len(parts) > 1 and row == len(array):
            ours = np.concatenate([_whole(weights, p) for p in parts])
            if _error(array, ours) <= limit:
                return _binding(value, tuple(parts), transposed)
    return None


def _with_duplicates(
    bindings: list[Binding], missing: list[str], samples: dict[str, FloatArray], weights: RunWeights
) -> list[Binding]:
    """Add each parameter without a place to a binding of one parameter that has its very values."""
    result = list(bindings)
    for parameter in missing:
        for i, binding in enumerate(result):
            if len(binding.parameters) == 1 and np.array_equal(samples[binding.parameters[0]], samples[parameter]):
                ours = _whole(weights, parameter)
                if np.array_equal(ours, _whole(weights, binding.parameters[0])):
                    result[i] = replace(binding, duplicates=(*binding.duplicates, parameter))
                    break
    return result


def _binding(value: ir.Value, parameters: tuple[str, ...], transposed: bool) -> Binding:
    reader = next(weight_uses(value)).node
    return Binding(reader.name or "", reader.op_type, parameters, {"weight": value.name or ""}, transposed)


def _array(value: ir.Value) -> FloatArray:
    array: FloatArray = value.const_value.numpy().astype(np.float32, copy=False)
    return array


def _orientations(array: FloatArray) -> tuple[bool, ...]:
    """Whether a stored tensor may be a parameter's transpose: only a matrix may."""
    return (False, True) if array.ndim == 2 else (False,)


def _oriented(array: FloatArray, transposed: bool) -> FloatArray:
    return array.T if transposed else array


def _whole(weights: RunWeights, parameter: str) -> FloatArray:
    array: FloatArray = weights.run.dequantized(parameter).numpy()
    return array
