"""Store float matrices in f16, with a Cast to f32 behind each: `export --dtype f16`.

The arithmetic stays in f32, as the builder's own fp16 graph for the CPU drops GroupQueryAttention, and with it
Mistral's sliding window (KL 0.013 on a random model with a window of 16). ONNX Runtime folds the Casts at load time.
"""

from __future__ import annotations

import onnx_ir as ir

from exporters.onnx.bindings import Binding
from exporters.onnx.graph_edit import set_float_initializer
from exporters.onnx.run_weights import RunWeights


def halve_weights(graph: ir.Graph, bindings: list[Binding], weights: RunWeights) -> None:
    """Round every bound float matrix to f16 and insert its Cast; norm weights and biases stay f32."""
    first = next(iter(graph))
    for binding in bindings:
        name = binding.initializers["weight"]
        value = graph.initializers[name]
        if binding.quantized or len(value.shape) != 2:
            continue
        cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT.value}, name=f"/{name}/Cast", num_outputs=1)
        output = cast.outputs[0]
        output.name, output.type, output.shape = f"{name}/Cast/output_0", ir.TensorType(ir.DataType.FLOAT), value.shape
        ir.convenience.replace_all_uses_with(value, output)
        cast.replace_input_with(0, value)  # the line before turned the Cast's own input too
        graph.insert_before(first, cast)
        set_float_initializer(graph, binding, "float16", weights)
