"""Let a finished graph compute in f16: `export --io-dtype f16`, the form that GPUs in browsers want.

Every f32 value becomes f16: activations, caches, logits, norm weights, the tables of RoPE. Codes and zero points stay,
and scales are the f16 values that were tuned, which MatMulNBits then reads without a Cast. Between Casts some nodes go
on in f32: those whose scales are no f16 values (of a Q6_K head), and in traced graphs, whose norms and rotation are
nodes of their own, sums of squares and the angles of RoPE, for which f16 is too small.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from exporters.onnx.bindings import Binding, scales_cast
from exporters.onnx.passes.graph_edit import set_float_initializer
from exporters.onnx.run_weights import RunWeights
from signround_edge.errors import UserError

_FLOAT, _HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
_LARGEST = float(np.finfo(np.float16).max)
_MASKED = -1e30  # constants below it only mask, and the smallest number of f16 does that, too
_QUANTIZED = ("MatMulNBits", "GatherBlockQuantized")
_CASTS = "/cast_by_io_dtype"
# Sums of squares and what is made of them, and what is too steep for f16.
_WIDE = ("Pow", "ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL2", "Sqrt", "Reciprocal", "Exp", "Log", "CumSum")
# They compute with positions, of which f16 counts 2,048.
_ANGLES = ("Cos", "Sin")
# Whose states are sums over the whole text.
_RECURRENT = ("LinearAttention", "Scan", "Loop")


def halve_activations(graph: ir.Graph, bindings: list[Binding], weights: RunWeights) -> None:
    """Make every f32 value of a graph f16, in place.

    Args:
        graph: with everything that the finished graph holds; scales of quantized nodes are stored in f16 where that
            loses nothing.
        bindings: what it holds of the run.
        weights: the run.
    Raises:
        UserError: a number is too large for f16, the graph computes RoPE's angles within a branch, or it keeps
            recurrent states.
    """
    _check(graph)
    for node in [n for n in graph if n.op_type in _QUANTIZED]:
        if (cast := scales_cast(node)) is not None:
            ir.convenience.replace_all_uses_with(cast.outputs[0], cast.inputs[0])
            graph.remove(cast, safe=True)
    kept = _kept_in_f32(graph)
    own = _own_initializers(graph, kept)
    bound = {b.initializers["weight"]: b for b in bindings if not b.quantized}
    for name, value in list(graph.initializers.items()):
        if value.const_value.dtype != _FLOAT or name in own:
            continue
        if name in bound:
            _check_range(name, weights.stored_floats(bound[name], "float32", tuple(value.shape.numpy())))
            set_float_initializer(graph, bound[name], "float16", weights)
        else:
            value.const_value = ir.tensor(_halved(name, value.const_value.numpy()), name=name)
            value.type = ir.TensorType(_HALF)
    _between_casts(graph, kept)
    for node in graph.all_nodes():  # those of subgraphs too: LongRoPE chooses one of two tables there
        if node in kept or str(node.name).endswith(_CASTS):
            continue
        _halve_attributes(node)
        for output in node.outputs:
            _halve_type(output)
    for value in [*graph.inputs, *graph.outputs]:
        _halve_type(value)


def _check(graph: ir.Graph) -> None:
    outer = set(graph)
    angles = next((node for node in graph.all_nodes() if node.op_type in _ANGLES and node not in outer), None)
    if angles is not None:
        raise UserError(
            f"--io-dtype f16: the graph computes the angles of RoPE in a branch (node {angles.name}), which f16 cannot "
            "hold for long texts; leave it out"
        )
    recurrent = next((n for n in graph if any(kind in n.op_type for kind in _RECURRENT)), None)
    if recurrent is not None:
        raise UserError(
            f"--io-dtype f16: recurrent layers (node {recurrent.name}) keep sums over the whole text, which are no "
            "place for f16; leave it out"
        )


def _kept_in_f32(graph: ir.Graph) -> set[ir.Node]:
    """The nodes that go on in f32, with those between them."""
    kept = {node for node in graph if node.op_type in _QUANTIZED and _scales_are_f32(node)}
    fused = {node for node in graph if node.op_type in (*_WIDE, *_ANGLES)}
    if not any(node.op_type in _ANGLES for node in fused):  # the builder's graph has whole norms and tables of angles
        return kept
    waiting = [node for node in fused if node.op_type in _ANGLES]
    while waiting:  # all that the angles are made of, as far as it is floats
        for value in waiting.pop().inputs:
            producer = None if value is None or value.dtype != _FLOAT else value.producer()
            if producer is not None and producer not in fused:
                fused.add(producer)
                waiting.append(producer)
    grown = True
    while grown:
        between = {n for n in graph if n not in fused and _is_between(n, fused)}
        fused, grown = fused | between, bool(between)
    return kept | fused


def _scales_are_f32(node: ir.Node) -> bool:
    scales = node.inputs[2]
    return scales is not None and scales.dtype == _FLOAT


def _is_between(node: ir.Node, kept: set[ir.Node]) -> bool:
    """Whether floats come to a node from kept ones and constants only, and go to kept ones only."""
    producers = [v.producer() for v in node.inputs if v is not None and v.dtype == _FLOAT and v.const_value is None]
    users = [use.node for output in node.outputs for use in output.uses()]
    outside = any(output.is_graph_output() for output in node.outputs)
    ends = [*producers, *users]
    return bool(producers) and bool(users) and not outside and all(end in kept for end in ends)


def _own_initializers(graph: ir.Graph, kept: set[ir.Node]) -> set[str]:
    """Names of f32 initializers that only nodes kept in f32 read; those that others read, too, get a copy for them."""
    own: set[str] = set()
    for name, value in list(graph.initializers.items()):
        uses = list(value.uses())
        inside = [use for use in uses if use.node in kept]
        if value.dtype != _FLOAT or not inside:
            continue
        if len(inside) < len(uses):
            copied = ir.Value(name=f"{name}/f32", type=value.type, shape=value.shape, const_value=value.const_value)
            graph.register_initializer(copied)
            for use in inside:
                use.node.replace_input_with(use.idx, copied)
            name = str(copied.name)
        own.add(name)
    return own


def _between_casts(graph: ir.Graph, kept: set[ir.Node]) -> None:
    """Put a Cast on every edge between nodes that go on in f32 and the others."""
    widened: dict[ir.Value, ir.Value] = {}
    for node in [n for n in graph if n in kept]:
        for index, value in enumerate(node.inputs):
            if value is None or value.dtype != _FLOAT or value.is_initializer() or value.producer() in kept:
                continue
            if value not in widened:
                cast = _cast(value, _FLOAT)
                producer = value.producer()
                if producer is None:
                    graph.insert_before(graph[0], cast)
                else:
                    graph.insert_after(producer, cast)
                widened[value] = cast.outputs[0]
            node.replace_input_with(index, widened[value])
        for output in [o for o in node.outputs if o.dtype == _FLOAT]:
            uses = [use for use in output.uses() if use.node not in kept]
            if not uses and not output.is_graph_output():
                continue
            cast = _cast(output, _HALF)
            graph.insert_after(node, cast)
            for use in uses:
                use.node.replace_input_with(use.idx, cast.outputs[0])
            if output.is_graph_output():
                name, output.name = output.name, f"{output.name}/f32"
                cast.outputs[0].name = name
                graph.outputs[list(graph.outputs).index(output)] = cast.outputs[0]


def _cast(value: ir.Value, to: ir.DataType) -> ir.Node:
    name = f"{value.name}{_CASTS}"
    made = ir.node("Cast", [value], {"to": to.value}, name=name, num_outputs=1)
    made.outputs[0].type, made.outputs[0].shape = ir.TensorType(to), value.shape
    made.outputs[0].name = f"{name}/output"
    return made


def _halve_type(value: ir.Value) -> None:
    if value.dtype == _FLOAT:
        value.type = ir.TensorType(_HALF)


def _halve_attributes(node: ir.Node) -> None:
    """Casts to f32 and constants of it; `stash_type`, the accuracy of a norm's sum, stays."""
    for name, attribute in list(node.attributes.items()):
        if node.op_type == "Cast" and name == "to" and attribute.as_int() == _FLOAT.value:
            node.attributes[name] = ir.AttrInt64(name, _HALF.value)
        elif attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype == _FLOAT:
            array = _halved(str(node.name), attribute.as_tensor().numpy())
            node.attributes[name] = ir.AttrTensor(name, ir.tensor(array))


def _halved(name: str, array: np.ndarray) -> np.ndarray:
    array = np.where(array < _MASKED, np.float32(-_LARGEST), array)
    _check_range(name, array)
    return array.astype(np.float16)


def _check_range(name: str, array: np.ndarray) -> None:
    largest = float(np.abs(array).max(initial=0))
    if largest > _LARGEST:
        raise UserError(f"--io-dtype f16: {name} holds {largest:.3g}, and f16 ends at {_LARGEST:.0f}; leave it out")
