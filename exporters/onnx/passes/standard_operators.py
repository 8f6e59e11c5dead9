"""Replace ONNX Runtime's own operators by standard ones: DequantizeLinear in front of MatMul and Gather.

For providers that know no MatMulNBits. The last pass over a finished graph; integers, scales and zero points stay what
they are. A tied embedding and head share their bytes: the embedding gathers columns of the head's [K, N].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray

from exporters.onnx.bindings import Binding, quantized_initializers, scales_cast
from exporters.onnx.passes.graph_edit import SHARES_BYTES, cast_to_float
from exporters.onnx.qdq import OPERATOR, QdqLayout, packed_tensor, qdq_layout, qdq_operands
from exporters.onnx.run_weights import RunWeights
from signround_edge.errors import UserError

_REPLACED = ("MatMulNBits", "GatherBlockQuantized")
OPSET, OPSET_2_BITS = 21, 25
_IR_VERSION, _IR_VERSION_2_BITS = 10, 13
_OLDEST = 18  # from here to opset 25 nothing that a language model has computes anything else
_BIAS = 5  # of MatMulNBits' inputs
_SCALES = {"float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16}


def use_standard_operators(model: ir.Model, bindings: list[Binding], weights: RunWeights) -> list[Binding]:
    """Replace every MatMulNBits and GatherBlockQuantized.

    Args:
        model: edited in place.
        bindings: what it holds.
        weights: the run.
    Returns:
        What it holds now.
    Raises:
        UserError: the graph's opset is too old (a template's may be), or it computes in f16.
    """
    graph = model.graph
    by_node = {binding.node: binding for binding in bindings if binding.op in _REPLACED}
    by_codes = {binding.initializers["weight"]: binding for binding in by_node.values()}
    _raise_opset(model, any(weights.layout(binding.parameters).bits == 2 for binding in by_codes.values()))
    made: dict[str, tuple[QdqLayout, dict[str, ir.Value]]] = {}  # initializer of codes → its operands
    renamed: dict[str, Binding] = {}
    nodes = [node for node in graph if node.op_type in _REPLACED]
    for node in sorted(nodes, key=lambda n: n.op_type == "GatherBlockQuantized"):  # heads before their embeddings
        old = quantized_initializers(node)
        codes = graph.initializers[old["weight"]]
        gathers = node.op_type == "GatherBlockQuantized"
        head = made.get(codes.meta.get(SHARES_BYTES, ""))
        if head is not None:
            layout, operands = head[0], {role: _alias(graph, value, codes) for role, value in head[1].items()}
        elif codes.name in made:
            layout, operands = made[codes.name]
        else:
            held = by_codes[codes.name]
            layout = qdq_layout(weights, held, columns_first=not gathers)
            operands = _make_operands(graph, codes.name.removesuffix(".qweight"), held, layout, weights)
            made[codes.name] = (layout, operands)
        dequantize = _dequantize(graph, node, layout, operands)
        if node.name in by_node:
            names = {role: str(value.name) for role, value in operands.items()}
            binding = by_node[node.name]
            renamed[node.name] = replace(binding, node=str(dequantize.name), op=OPERATOR, initializers=names)
    _drop_unused(graph)
    return [renamed[binding.node] if binding.op in _REPLACED else binding for binding in bindings]


def _raise_opset(model: ir.Model, two_bits: bool) -> None:
    wanted, version = (OPSET_2_BITS, _IR_VERSION_2_BITS) if two_bits else (OPSET, _IR_VERSION)
    found = model.opset_imports.get("", 1)
    if found < _OLDEST:
        raise UserError(
            f"--operators qdq needs opset {wanted}, and the graph of --template has {found}; export the template with "
            f"opset {_OLDEST} or later"
        )
    model.opset_imports[""] = max(found, wanted)
    model.ir_version = max(model.ir_version or 0, version)


def _make_operands(
    graph: ir.Graph, base: str, binding: Binding, layout: QdqLayout, weights: RunWeights
) -> dict[str, ir.Value]:
    """Initializers `<base>.codes`, `.scales` and, unless codes are signed, `.zero_points`."""

    def operand(role: str) -> NDArray[Any]:
        return qdq_operands(weights, binding, layout)[role]

    scales = _SCALES[layout.scale_dtype]
    made = {
        "weight": _register(graph, f"{base}.codes", layout.dtype, layout.weight_shape, lambda: operand("weight")),
        "scales": _register(graph, f"{base}.block_scales", scales, layout.scales_shape, lambda: operand("scales")),
    }
    if layout.zero is None:
        name = f"{base}.zero_points"
        made["zero_points"] = _register(graph, name, layout.dtype, layout.scales_shape, lambda: operand("zero_points"))
    return made


def _register(
    graph: ir.Graph, name: str, dtype: ir.DataType, shape: tuple[int, ...], make: Callable[[], NDArray[Any]]
) -> ir.Value:
    """An initializer whose data is made when the file is written."""

    def evaluate() -> ir.TensorProtocol:
        array = make()
        assert array.shape == shape, name
        return ir.Tensor(array, name=name) if dtype in _SCALES.values() else packed_tensor(array, dtype, name)

    tensor = ir.LazyTensor(evaluate, dtype=dtype, shape=ir.Shape(shape), name=name)
    value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape), const_value=tensor)
    graph.register_initializer(value)
    return value


def _alias(graph: ir.Graph, value: ir.Value, codes: ir.Value) -> ir.Value:
    """Another initializer at the same place of the data file: ONNX Runtime fuses only what one node reads."""
    base = str(codes.name).removesuffix(".qweight")
    name = f"{base}.{str(value.name).rsplit('.', 1)[1]}"
    alias = ir.Value(name=name, type=value.type, shape=value.shape, const_value=value.const_value)
    alias.meta[SHARES_BYTES] = value.name
    graph.register_initializer(alias)
    return alias


def _dequantize(graph: ir.Graph, node: ir.Node, layout: QdqLayout, operands: dict[str, ir.Value]) -> ir.Node:
    """Put DequantizeLinear and MatMul or Gather in the place of a node; returns the first."""
    gathers = node.op_type == "GatherBlockQuantized"
    standard = "Gather" if gathers else "MatMul"
    name = str(node.name)
    base = name.replace(node.op_type, standard) if node.op_type in name else f"{name}/{standard}"
    scales = operands["scales"]
    if scales.dtype == ir.DataType.FLOAT16 and scales_cast(node) is None:
        raise UserError(
            f"--operators qdq needs activations in f32, and node {name} has them in f16, in which DequantizeLinear "
            "would round the weights; export a graph in f32"
        )
    inputs = [operands["weight"], scales, operands.get("zero_points")]
    if layout.scale_dtype == "float16":
        # Its output has the dtype of the scales, and must be f32. ONNX Runtime folds the Cast.
        inputs[1] = next((u.node.outputs[0] for u in scales.uses() if u.node.op_type == "Cast"), None) or cast_to_float(
            graph, scales
        )
    dequantize = ir.node(
        OPERATOR,
        inputs if inputs[2] is not None else inputs[:2],
        layout.attributes,
        name=f"{base}/{OPERATOR}",
        num_outputs=1,
    )
    weight = dequantize.outputs[0]
    weight.name = f"{base}/{OPERATOR}/output_0"
    weight.type, weight.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(layout.weight_shape)
    if not gathers:
        chain = [ir.node("MatMul", [node.inputs[0], weight], name=base, num_outputs=1)]
        if len(node.inputs) > _BIAS and node.inputs[_BIAS] is not None:
            sum_of = [chain[0].outputs[0], node.inputs[_BIAS]]
            chain.append(ir.node("Add", sum_of, name=f"{base}/Add", num_outputs=1))
    elif not layout.columns_first:
        chain = [ir.node("Gather", [weight, node.inputs[1]], {"axis": 0}, name=base, num_outputs=1)]
    else:
        gather = ir.node("Gather", [weight, node.inputs[1]], {"axis": 1}, name=base, num_outputs=1)
        order = {"perm": [1, 2, 0]}  # [K, batch, tokens] → [batch, tokens, K]
        chain = [gather, ir.node("Transpose", [gather.outputs[0]], order, name=f"{base}/Transpose", num_outputs=1)]
    ir.convenience.replace_nodes_and_values(graph, node, [node], [dequantize, *chain], node.outputs, chain[-1].outputs)
    return dequantize


def _drop_unused(graph: ir.Graph) -> None:
    """Initializers that nothing reads any more, and the Casts behind their scales."""
    for node in [n for n in graph if n.op_type == "Cast" and not n.outputs[0].uses()]:
        value = node.inputs[0]
        if value is not None and value.is_initializer() and node.outputs[0] not in graph.outputs:
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and value not in graph.outputs:
            del graph.initializers[name]
