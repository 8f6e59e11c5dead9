"""Store float matrices in f16, with a Cast to f32 behind each: `export --dtype f16`.

The arithmetic stays in f32, as the builder's own fp16 graph for the CPU drops GroupQueryAttention, and with it
Mistral's sliding window (KL 0.013 on a random model with a window of 16). ONNX Runtime folds the Casts at load time.
"""

from __future__ import annotations

import onnx_ir as ir

from exporters.onnx.bindings import Binding
from exporters.onnx.passes.graph_edit import cast_to_float, set_float_initializer
from exporters.onnx.run_weights import RunWeights


def halve_weights(graph: ir.Graph, bindings: list[Binding], weights: RunWeights) -> None:
    """Round every bound float matrix to f16 and insert its Cast; norm weights and biases stay f32."""
    for binding in bindings:
        value = graph.initializers[binding.initializers["weight"]]
        if binding.quantized or len(value.shape) != 2 or value.const_value.dtype == ir.DataType.FLOAT16:
            continue  # a template's may be in f16 already
        uses = list(value.uses())
        output = cast_to_float(graph, value)
        for node, position in uses:
            node.replace_input_with(position, output)
        set_float_initializer(graph, binding, "float16", weights)
