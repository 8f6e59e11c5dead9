"""Which nodes read a stored weight, also through the Transpose, Cast and Identity nodes that graphs put in between."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


@dataclass(frozen=True)
class WeightUse:
    """One input of one node that reads a stored matrix.

    Attributes:
        node: the reader.
        position: which of its inputs.
        transposed: it sees the transpose of what is stored.
        dtype: it sees this dtype; for a MatMul that is also the dtype of its activations.
    """

    node: ir.Node
    position: int
    transposed: bool
    dtype: ir.DataType


def float_initializers(graph: ir.Graph) -> dict[str, ir.Value]:
    """Name → value of the f32 and f16 vectors, matrices and kernels of convolutions that are stored."""
    return {name: value for name, value in graph.initializers.items() if _is_float_weight(value.const_value)}


def weight_uses(value: ir.Value) -> Iterator[WeightUse]:
    """Every reader of the initializer `value`; nodes that only pass it on are followed."""
    yield from _follow(value, False, value.const_value.dtype)


def _follow(value: ir.Value, transposed: bool, dtype: ir.DataType) -> Iterator[WeightUse]:
    for node, position in list(value.uses()):
        if node.domain not in ("", "ai.onnx"):
            yield WeightUse(node, position, transposed, dtype)
        elif node.op_type == "Identity":
            yield from _follow(node.outputs[0], transposed, dtype)
        elif node.op_type == "Cast" and node.attributes["to"].as_int() in [d.value for d in _FLOATS]:
            yield from _follow(node.outputs[0], transposed, ir.DataType(node.attributes["to"].as_int()))
        elif node.op_type == "Transpose" and _swaps(node):
            yield from _follow(node.outputs[0], not transposed, dtype)
        else:
            yield WeightUse(node, position, transposed, dtype)


def _swaps(node: ir.Node) -> bool:
    """Whether a Transpose exchanges the two axes of a matrix, which is also its default."""
    permutation = node.attributes.get("perm")
    return permutation is None or tuple(permutation.as_ints()) == (1, 0)


def _is_float_weight(tensor: ir.TensorProtocol | None) -> bool:
    return tensor is not None and tensor.dtype in _FLOATS and len(tensor.shape) >= 1
