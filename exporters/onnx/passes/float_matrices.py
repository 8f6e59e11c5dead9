"""Put float MatMuls where the run keeps a matrix in floats (its row length is no multiple of any block size)."""

from __future__ import annotations

import onnx_ir as ir

from exporters.onnx.bindings import Binding, find_bindings
from exporters.onnx.passes.graph_edit import replace_node, set_float_initializer
from exporters.onnx.run_weights import RunWeights


def set_float_matrices(graph: ir.Graph, weights: RunWeights) -> None:
    """Replace every placeholder MatMulNBits (see `staging`) by MatMul with the run's weight, stored [K, N] in f32."""
    nodes = {node.name: node for node in graph}
    for binding in find_bindings(graph):
        if binding.op != "MatMulNBits" or weights.is_quantized(binding.parameters):
            continue
        node = nodes[binding.node]
        name = binding.initializers["weight"].replace("MatMulNBits.qweight", "MatMul.weight")
        target = Binding(binding.node, "MatMul", binding.parameters, {"weight": name}, transposed=True)
        value = set_float_initializer(graph, target, "float32", weights)
        replace_node(graph, node, "MatMul", "", [node.inputs[0], value], {})
