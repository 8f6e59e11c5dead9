"""Recognising the run's parameters in a graph that was built from `stand_ins`: matrices by rows, all others by value.

Each float tensor of the graph must equal a parameter, some of them stacked, or a function of one (`functions`), bit for
bit. Where several parameters have the same values, as norms of ones, names decide, and it does not matter how.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from exporters.onnx.bindings import Binding
from exporters.onnx.functions import FUNCTIONS
from exporters.onnx.passes.weight_uses import weight_uses
from exporters.onnx.routes.matching import likeness
from exporters.onnx.routes.stand_ins import StandIns
from exporters.onnx.run_weights import RunWeights

FloatArray = NDArray[np.float32]
_Form = tuple[str, str]  # a parameter and the function of it
_Place = tuple[tuple[str, ...], str]  # parameters, one after the other, and the function of them


def recognise(graph: ir.Graph, weights: RunWeights, stand_ins: StandIns) -> list[Binding]:
    """One binding for each initializer that holds parameters of the run."""
    _lift_scalars(graph, weights)
    bindings = []
    floats: dict[str, FloatArray] = {}
    for name, value in graph.initializers.items():
        if value.const_value.dtype != ir.DataType.FLOAT or not value.uses():
            continue
        array: FloatArray = value.const_value.numpy()
        held = stand_ins.find(array) if array.ndim == 2 else None
        if held is None:
            floats[name] = array
        else:
            node, op = _reader(value)
            bindings.append(Binding(node, op, held.parameters, {"weight": name}, held.transposed, rows=held.rows))
    return bindings + _recognise_floats(graph, floats, weights, set(stand_ins.shapes))


def _lift_scalars(graph: ir.Graph, weights: RunWeights) -> None:
    """Make initializers of the constants that equal a parameter of one value (Gemma 4's factor of a layer)."""
    run = weights.run
    scalars = {run.dequantized(n).numpy().tobytes() for n in run.names() if math.prod(run.entry(n).shape) == 1}
    for node in [node for node in graph if node.op_type == "Constant"]:
        attribute = node.attributes.get("value")
        tensor = None if attribute is None else attribute.as_tensor()
        if tensor is None or tensor.dtype != ir.DataType.FLOAT or tensor.numpy().tobytes() not in scalars:
            continue
        old = node.outputs[0]
        new = ir.Value(name=old.name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
        ir.convenience.replace_all_uses_with(old, new)
        graph.remove(node, safe=True)
        graph.register_initializer(new)


def _recognise_floats(
    graph: ir.Graph, floats: dict[str, FloatArray], weights: RunWeights, matrices: set[str]
) -> list[Binding]:
    ours: dict[str, FloatArray] = {
        n: weights.run.dequantized(n).numpy() for n in weights.run.names() if n not in matrices
    }
    by_value: dict[bytes, list[_Form]] = {}
    arrays: dict[_Form, FloatArray] = {}
    for name in ours:
        for formula, function in FUNCTIONS.items():
            array = function(weights.run.dequantized(name)).numpy().reshape(-1)
            arrays[name, formula] = array
            by_value.setdefault(array.tobytes(), []).append((name, formula))
    pairs = []
    places: dict[str, _Place] = {}
    for name, array in floats.items():
        for parameter, formula in by_value.get(array.tobytes(), []):
            # A parameter itself before a function of another one: 1 + x of zeros is a norm of ones.
            pairs.append((formula == "", likeness(name, parameter), name, (parameter, formula)))
    taken: set[str] = set()
    for again in (False, True):  # each parameter once, then those that the graph stores twice
        for _, _, name, (parameter, formula) in sorted(pairs, key=lambda pair: pair[:2], reverse=True):
            if name not in places and (again or parameter not in taken):
                places[name] = ((parameter,), formula)
                taken.add(parameter)
    for name, array in floats.items():
        if name not in places and array.ndim == 1 and (stack := _stack(name, array, arrays)) is not None:
            places[name] = stack
            taken.update(stack[0])
    bindings = []
    for name, (parameters, formula) in places.items():
        node, op = _reader(graph.initializers[name])
        bindings.append(Binding(node, op, parameters, {"weight": name}, function=formula))
    return _with_duplicates(bindings, [n for n in ours if n not in taken], ours)


def _stack(name: str, array: FloatArray, arrays: dict[_Form, FloatArray]) -> _Place | None:
    """The parameters whose values, one after the other, are this vector (the biases of a packed projection)."""
    for formula in FUNCTIONS:
        parts: list[str] = []
        start = 0
        while start < len(array):
            fits = [
                parameter
                for (parameter, form), values in arrays.items()
                if form == formula
                and parameter not in parts
                and np.array_equal(array[start : start + len(values)], values)
            ]
            if not fits:
                break
            parts.append(max(fits, key=lambda parameter: likeness(name, parameter)))
            start += len(arrays[parts[-1], formula])
        if parts and start == len(array):
            return tuple(parts), formula
    return None


def _with_duplicates(bindings: list[Binding], missing: list[str], ours: dict[str, FloatArray]) -> list[Binding]:
    """Add each parameter without a place to a binding of one parameter that has its very values."""
    for parameter in missing:
        for i, binding in enumerate(bindings):
            if len(binding.parameters) == 1 and np.array_equal(ours[binding.parameters[0]], ours[parameter]):
                bindings[i] = replace(binding, duplicates=(*binding.duplicates, parameter))
                break
    return bindings


def _reader(value: ir.Value) -> tuple[str, str]:
    """(name, operator) of a node that reads an initializer; of a tied head and embedding the head."""
    uses: list[Any] = sorted(weight_uses(value), key=lambda use: use.node.op_type != "MatMul")
    return uses[0].node.name or "", uses[0].node.op_type
