"""Give every MatMulNBits the run directory's integers and scales, in 2-D, with explicit zero points.

The builder's graph has stand-ins there (see `staging`), so the length of the product is set too. Zero points stay even
where they equal the default 2^(bits−1): without them ARM64 takes a kernel whose activation error is up to twice as
large; with them ARM64 equals x86.
"""

from __future__ import annotations

import onnx_ir as ir

from exporters.onnx.bindings import find_bindings
from exporters.onnx.passes.graph_edit import set_operand_initializers
from exporters.onnx.run_weights import RunWeights


def set_operands(graph: ir.Graph, weights: RunWeights) -> None:
    """Replace length and the three stored operands of every MatMulNBits whose parameters the run stores as codes."""
    nodes = {node.name: node for node in graph}
    for binding in find_bindings(graph):
        if binding.op != "MatMulNBits" or not weights.is_quantized(binding.parameters):
            continue
        node = nodes[binding.node]
        base = binding.initializers["weight"].removesuffix(".qweight")
        node.attributes.add(ir.AttrInt64("K", weights.layout(binding.parameters).cols))
        node.resize_inputs(4)
        for position, value in enumerate(set_operand_initializers(graph, base, binding.parameters, weights), start=1):
            node.replace_input_with(position, value)
