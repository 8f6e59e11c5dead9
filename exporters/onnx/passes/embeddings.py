"""Replace the builder's float embedding: by GatherBlockQuantized where the run stores codes, else by the run's floats.

A quantized embedding that is tied to the head shares everything with the head's MatMulNBits: the same scales and zero
points, and the same bytes of codes, which MatMulNBits sees as [N, blocks, g·bits/8] and GatherBlockQuantized as
[N, K·bits/8]. Two initializers at one place in the data file cost nothing; a Reshape in the graph would be folded by
ONNX Runtime into a second copy in memory.
"""

from __future__ import annotations

import onnx_ir as ir

from exporters.onnx.bindings import Binding
from exporters.onnx.builder_names import EMBEDDING, EMBEDDING_NODE, HEAD, HEAD_BASE
from exporters.onnx.passes.graph_edit import gather_attributes, replace_node, set_float_initializer, set_gather_operands
from exporters.onnx.run_weights import RunWeights

_BASE = "model.embed_tokens.MatMulNBits"


def set_embedding(graph: ir.Graph, weights: RunWeights) -> None:
    """Replace the placeholder embedding of the builder's graph."""
    gather = next(node for node in graph if node.name == EMBEDDING_NODE)
    if not weights.is_quantized((EMBEDDING,)):
        set_float_initializer(
            graph, Binding(EMBEDDING_NODE, "Gather", (EMBEDDING,), {"weight": EMBEDDING}), "float32", weights
        )
        return
    shared = []
    if weights.run.manifest.tied.get(HEAD) == EMBEDDING:
        head = next(iter(graph.initializers[f"{HEAD_BASE}.qweight"].consumers()))
        shared = [value for value in head.inputs[1:4] if value is not None]
    codes, scales, zeros = set_gather_operands(graph, _BASE, (EMBEDDING,), weights, shared)
    inputs = [codes, gather.inputs[1], scales, zeros]
    attributes = gather_attributes(weights.layout((EMBEDDING,)))
    replace_node(graph, gather, "GatherBlockQuantized", "com.microsoft", inputs, attributes)
