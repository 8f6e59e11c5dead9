"""Set how MatMulNBits may compute: 0 as the runtime likes, 1 in f32, 4 with activations rounded to int8."""

from __future__ import annotations

import onnx_ir as ir

_ROUNDS_INPUTS = 4


def set_accuracy_level(graph: ir.Graph, level: int) -> None:
    """Set the attribute `accuracy_level` of every MatMulNBits (the builder's own default on CPU is 4).

    QMoE has it for 4 only: f32 is its default, and ONNX Runtime before 1.31 refuses a graph that says so.
    """
    for node in graph:
        if node.op_type == "QMoE":
            node.attributes.pop("accuracy_level", None)
        if node.op_type == "MatMulNBits" or (node.op_type == "QMoE" and level == _ROUNDS_INPUTS):
            node.attributes.add(ir.AttrInt64("accuracy_level", level))
