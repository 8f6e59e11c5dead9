"""Put the run's weights into a float graph whose initializers have been matched with its parameters.

Quantized ones become MatMulNBits and GatherBlockQuantized in the place of the MatMul, Gemm and Gather that read them.
Both compute in f32 here: where the graph computes in f16, Casts stand around them, since scales are stored in f32.
"""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir

from exporters.onnx.bindings import Binding, Rows, quantized_initializers
from exporters.onnx.packing import OperandLayout
from exporters.onnx.passes.graph_edit import (
    gather_attributes,
    set_float_initializer,
    set_gather_operands,
    set_operand_initializers,
)
from exporters.onnx.passes.weight_uses import WeightUse, weight_uses
from exporters.onnx.run_weights import RunWeights
from signround_edge.errors import UserError

_DOMAIN = "com.microsoft"
_OPERATORS = ("MatMulNBits", "GatherBlockQuantized")
_FLOAT_NAMES = {ir.DataType.FLOAT: "float32", ir.DataType.FLOAT16: "float16"}


def set_matched_weights(
    model: ir.Model, matched: list[Binding], weights: RunWeights, keep_floats: bool, keep_names: bool = False
) -> list[Binding]:
    """Replace the data of every matched initializer, and the nodes that read a quantized one.

    Args:
        model: the float graph, edited in place; nodes and initializers that nothing reads any more stay.
        matched: what `matching` found in it.
        weights: the run.
        keep_floats: write dequantized weights in the dtype of each initializer, and leave all nodes as they are.
        keep_names: quantized nodes are named as the graph names the float ones, not by parameters.
    Returns:
        What the graph holds now.
    Raises:
        UserError: a quantized matrix is read by a node that has no quantized form, or the parts of a stacked one differ
            in bits or block size.
    """
    bindings = []
    quantized: dict[tuple[tuple[str, ...], Rows], list[Binding]] = {}
    for binding in matched:
        if keep_floats or not any(weights.run.is_quantized(p) for p in binding.parameters):
            value = model.graph.initializers[binding.initializers["weight"]]
            set_float_initializer(model.graph, binding, _FLOAT_NAMES[value.const_value.dtype], weights)
            bindings.append(binding)
        else:
            quantized.setdefault((binding.parameters, binding.rows), []).append(binding)
    for copies in quantized.values():
        bindings += _quantize(model.graph, copies, weights, keep_names)
    model.opset_imports.setdefault(_DOMAIN, 1)
    return bindings


def _quantize(graph: ir.Graph, copies: list[Binding], weights: RunWeights, keep_names: bool) -> list[Binding]:
    """Replace every reader of one matrix; they share its operands.

    Args:
        graph: the graph to edit.
        copies: the initializers that hold it (a graph may store a tied head and embedding one by one).
        weights: the run.
        keep_names: see `set_matched_weights`.
    """
    uses = []
    for binding in copies:
        _check_stack(binding, weights)
        # Codes are [N, K]; a Conv1D weight of Hugging Face is [K, N].
        stored_as_codes = binding.transposed == weights.run.entry(weights.owner(binding.parameters[0])).transposed
        for use in weight_uses(graph.initializers[binding.initializers["weight"]]):
            _check_use(use, stored_as_codes != use.transposed, binding)
            uses.append((use, binding))
    # MatMulNBits first: GatherBlockQuantized then sees the same bytes.
    uses.sort(key=lambda pair: pair[0].node.op_type == "Gather")
    layout = weights.layout(copies[0].parameters, copies[0].rows)
    operands: list[ir.Value] = []
    result = []
    for count, (use, binding) in enumerate(uses):
        base, name = _names(use, copies[0], count, keep_names)
        if use.node.op_type == "Gather":
            # Beside a MatMulNBits of the same matrix the codes are a second initializer: another shape of its bytes.
            rows = f"{base}.rows" if operands and not keep_names else base
            node = _to_gather(graph, use, name, set_gather_operands(graph, rows, binding, weights, operands), layout)
        else:
            operands = operands or set_operand_initializers(graph, base, binding, weights)
            node = _to_matmul(graph, use, name, operands, layout)
        initializers = quantized_initializers(node)
        result.append(replace(binding, node=name, op=node.op_type, initializers=initializers, transposed=False))
    return result


def _check_stack(binding: Binding, weights: RunWeights) -> None:
    """UserError unless all parts of a stacked matrix are packed alike."""
    kinds = {weights.run.entry(weights.owner(p)).format for p in binding.parameters}
    if len(kinds) > 1:
        raise UserError(
            f"initializer {binding.initializers['weight']} of the graph holds {', '.join(binding.parameters)}, "
            "which the run stores in different formats; quantize with one --tensor-type for them, or give a template "
            "that keeps them apart"
        )


def _check_use(use: WeightUse, as_codes: bool, binding: Binding) -> None:
    """UserError unless that node can read codes; `as_codes`: it sees [N, K]."""
    node, op = use.node, use.node.op_type
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    if op == "MatMul":
        fits = use.position == 1 and not as_codes
    elif op == "Gemm":
        plain = not attributes.get("transA") and attributes.get("alpha", 1.0) == attributes.get("beta", 1.0) == 1.0
        fits = use.position == 1 and plain and as_codes == bool(attributes.get("transB"))
    else:
        fits = op == "Gather" and use.position == 0 and as_codes and attributes.get("axis", 0) in (0, -2)
    if not fits or node.domain not in ("", "ai.onnx"):
        raise UserError(
            f"tensor {binding.title} is read by node {node.name} ({op}), which ONNX Runtime has in no "
            "quantized form; export with --dtype f32, or give --template with a graph of MatMul, Gemm and Gather"
        )


def _names(use: WeightUse, binding: Binding, count: int, keep_names: bool) -> tuple[str, str]:
    """Where the names of operands start, and the node's name.

    They follow the parameter, or the initializer where that is no whole parameter; or the node that is replaced.

    Args:
        count: how many nodes read this matrix already.
    """
    op = _OPERATORS[use.node.op_type == "Gather"]
    if keep_names:
        stem = (use.node.name or "").removesuffix(use.node.op_type)
        return f"{stem.lstrip('/').replace('/', '.')}{_OPERATORS[0]}", stem + op
    whole = len(binding.parameters) == 1 and not binding.rows
    base = (binding.parameters[0] if whole else binding.initializers["weight"]).removesuffix(".weight")
    return base, f"/{base.replace('.', '/')}/{op}" + (f"_{count}" if count else "")


def _to_matmul(graph: ir.Graph, use: WeightUse, name: str, operands: list[ir.Value], layout: OperandLayout) -> ir.Node:
    """MatMulNBits in the place of a MatMul or Gemm, and an Add for the Gemm's bias."""
    old = use.node
    attributes = {"K": layout.cols, "N": layout.rows, "bits": layout.bits, "block_size": layout.block_size}
    half = use.dtype != ir.DataType.FLOAT
    before = [_cast(old.inputs[0], ir.DataType.FLOAT, f"{name}/Cast_input")] if half else []
    inputs = [before[0].outputs[0] if half else old.inputs[0], *operands]
    node = ir.node("MatMulNBits", inputs, attributes, domain=_DOMAIN, name=name, num_outputs=1)
    chain = [*before, node]
    if half:
        chain.append(_cast(node.outputs[0], use.dtype, f"{name}/Cast"))
    if old.op_type == "Gemm" and len(old.inputs) > 2 and old.inputs[2] is not None:
        chain.append(ir.node("Add", [chain[-1].outputs[0], old.inputs[2]], name=f"{name}/Add", num_outputs=1))
    _put(graph, old, chain)
    return node


def _to_gather(graph: ir.Graph, use: WeightUse, name: str, operands: list[ir.Value], layout: OperandLayout) -> ir.Node:
    """GatherBlockQuantized in the place of a Gather."""
    old = use.node
    weight, scales, zeros = operands
    attributes = gather_attributes(layout)
    inputs = [weight, old.inputs[1], scales, zeros]
    node = ir.node("GatherBlockQuantized", inputs, attributes, domain=_DOMAIN, name=name, num_outputs=1)
    half = use.dtype != ir.DataType.FLOAT
    _put(graph, old, [node, _cast(node.outputs[0], use.dtype, f"{name}/Cast")] if half else [node])
    return node


def _cast(value: ir.Value, dtype: ir.DataType, name: str) -> ir.Node:
    return ir.node("Cast", [value], {"to": dtype.value}, name=name, num_outputs=1)


def _put(graph: ir.Graph, old: ir.Node, chain: list[ir.Node]) -> None:
    """Put nodes in the place of `old`; the last one writes its output.

    The others' outputs get names here, as those that the graph would give depend on how many it has given.
    """
    for node in chain[:-1]:
        node.outputs[0].name = f"{node.name}/output_0"
    ir.convenience.replace_nodes_and_values(graph, old, [old], chain, old.outputs, chain[-1].outputs)
