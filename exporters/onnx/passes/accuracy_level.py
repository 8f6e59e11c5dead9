"""Set how MatMulNBits may compute: 0 as the runtime likes, 1 in f32, 4 with activations rounded to int8."""

from __future__ import annotations

import onnx_ir as ir


def set_accuracy_level(graph: ir.Graph, level: int) -> None:
    """Set the attribute `accuracy_level` of every MatMulNBits (the builder's own default on CPU is 4)."""
    for node in graph:
        if node.op_type == "MatMulNBits":
            node.attributes.add(ir.AttrInt64("accuracy_level", level))
