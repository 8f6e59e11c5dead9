"""Let a finished graph compute in f16: `export --io-dtype f16`, the form that GPUs in browsers want.

Every f32 value becomes f16: activations, caches, logits, norm weights, the tables of RoPE. Codes and zero points stay,
and scales are the f16 values that were tuned, which MatMulNBits then reads without a Cast. Scales that are no f16
values (of a Q6_K head) stay as they are: their nodes compute in f32 between two Casts.
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
# They compute positions or frequencies, which f16 cannot count beyond 2048.
_INEXACT = ("Cos", "Sin")


def halve_activations(graph: ir.Graph, bindings: list[Binding], weights: RunWeights) -> None:
    """Make every f32 value of a graph f16, in place.

    Args:
        graph: with everything that the finished graph holds; scales of quantized nodes are stored in f16 where that
            loses nothing.
        bindings: what it holds of the run.
        weights: the run.
    Raises:
        UserError: a number is too large for f16, or the graph computes RoPE's angles, or keeps recurrent states.
    """
    _check(graph)
    floats: set[ir.Node] = set()
    for node in [n for n in graph if n.op_type in _QUANTIZED]:
        if (cast := scales_cast(node)) is not None:
            ir.convenience.replace_all_uses_with(cast.outputs[0], cast.inputs[0])
            graph.remove(cast, safe=True)
        elif node.inputs[2] is not None and node.inputs[2].dtype == _FLOAT:
            floats.update(_between_casts(graph, node))
    scales = {str(node.inputs[2].name) for node in floats if node.op_type in _QUANTIZED and node.inputs[2] is not None}
    bound = {b.initializers["weight"]: b for b in bindings if not b.quantized}
    for name, value in list(graph.initializers.items()):
        if value.const_value.dtype != _FLOAT or name in scales:
            continue
        if name in bound:
            _check_range(name, weights.stored_floats(bound[name], "float32", tuple(value.shape.numpy())))
            set_float_initializer(graph, bound[name], "float16", weights)
        else:
            value.const_value = ir.tensor(_halved(name, value.const_value.numpy()), name=name)
            value.type = ir.TensorType(_HALF)
    for node in graph.all_nodes():  # those of subgraphs too: LongRoPE chooses one of two tables there
        if node in floats:
            continue
        _halve_attributes(node)
        for output in node.outputs:
            _halve_type(output)
    for value in [*graph.inputs, *graph.outputs]:
        _halve_type(value)


def _check(graph: ir.Graph) -> None:
    angles = next((node for node in graph.all_nodes() if node.op_type in _INEXACT), None)
    if angles is not None:
        raise UserError(
            f"--io-dtype f16: the graph computes the angles of RoPE itself (node {angles.name}), which f16 cannot hold "
            "for long texts; leave it out"
        )
    recurrent = next((node for node in graph if "LinearAttention" in node.op_type), None)
    if recurrent is not None:
        raise UserError(
            f"--io-dtype f16: linear attention (node {recurrent.name}) keeps sums over the whole text, which are no "
            "place for f16; leave it out"
        )


def _between_casts(graph: ir.Graph, old: ir.Node) -> list[ir.Node]:
    """Put Casts before and behind a quantized node; returns the nodes that compute in f32."""
    name = str(old.name)
    inputs = list(old.inputs)
    chain = []
    if old.op_type == "MatMulNBits":
        chain.append(ir.node("Cast", [inputs[0]], {"to": _FLOAT.value}, name=f"{name}/Cast_input", num_outputs=1))
        inputs[0] = chain[0].outputs[0]
    attributes = list(old.attributes.values())
    node = ir.Node(old.domain, old.op_type, inputs, attributes, name=name, num_outputs=1)
    behind = ir.node("Cast", [node.outputs[0]], {"to": _HALF.value}, name=f"{name}/Cast", num_outputs=1)
    kept = [*chain, node]
    ir.convenience.replace_nodes_and_values(graph, old, [old], [*kept, behind], old.outputs, behind.outputs)
    for made in kept:
        made.outputs[0].type = ir.TensorType(_FLOAT)
    return kept


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
