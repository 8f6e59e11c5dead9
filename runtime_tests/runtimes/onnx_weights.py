"""Every stored weight of an ONNX artifact through ONNX Runtime's own dequantizer, wherever the runtime is.

Each quantized node of an artifact is made a model of its own, with the artifact's operands; see
`runtime_tests.worker.onnx_dequantize`, which runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from exporters.onnx.artifact.reader import Artifact, has_sidecar, open_artifact, stored_floats
from exporters.onnx.bindings import holds_columns_first, quantized_initializers
from runtime_tests.runtimes.onnx_experts import dequantize_experts
from runtime_tests.runtimes.onnx_refusal import refusal_said
from runtime_tests.worker.onnx_dequantize import NodeModel, run_node_model
from signround_edge.evaluation.metrics import FloatArray

_WEIGHTS_PER_MODEL = 1 << 23  # bounds memory to some 100 MB

# f32 [rows, cols] of a NodeModel, wherever the runtime is.
Dequantizer = Callable[[NodeModel], FloatArray]


def dequantize_through_runtime(
    artifact: Path, dequantizer: Dequantizer = run_node_model
) -> Iterator[tuple[str, FloatArray]]:
    """Every stored weight of an artifact, one at a time: (name, f32 weights).

    Quantized ones are named by their node (and matrix and expert of a QMoE) and are [N, K]; the float ones that hold a
    parameter follow as they are stored (names and order as in `exporters.onnx.artifact.reader.iter_expected`).

    Args:
        artifact: the folder or the .onnx file.
        dequantizer: runs the node models; by default ONNX Runtime in this process.
    Raises:
        UserError: the file is broken, or the runtime refuses a node.
    """
    opened = open_artifact(artifact)
    for node, part in opened.quantized_parts():
        if part:
            yield from dequantize_experts(opened, node, part, dequantizer)
        else:
            yield node.name or "", dequantize_node(opened, node, dequantizer)
    if has_sidecar(opened.path):
        yield from stored_floats(opened)


def dequantize_node(artifact: Artifact, node: Any, dequantizer: Dequantizer = run_node_model) -> FloatArray:
    """f32 [N, K] of one MatMulNBits, GatherBlockQuantized or DequantizeLinear node (an `onnx_ir.Node`)."""
    operands = {role: artifact.array(name) for role, name in quantized_initializers(node).items()}
    # As the graph does before it computes; one that computes in f16 (--io-dtype) rounds what they give.
    if operands["scales"].dtype == np.float16:
        operands["scales"] = operands["scales"].astype(np.float32)
    if node.op_type != "DequantizeLinear":
        attributes = {name: artifact.attribute(node, name) for name in ("bits", "block_size")}
    with refusal_said(artifact.path, node, "export the run again"):
        if node.op_type == "DequantizeLinear":
            return dequantize_standard(node, operands, dequantizer)
        return dequantize_operands(node.op_type, operands, attributes, dequantizer)


def dequantize_operands(
    op: str,
    operands: dict[str, NDArray[Any]],
    attributes: dict[str, int],
    dequantizer: Dequantizer = run_node_model,
) -> FloatArray:
    """f32 [N, K] of stored operands through ONNX Runtime.

    Args:
        op: "MatMulNBits" or "GatherBlockQuantized".
        operands: "weight" uint8 [N, blocks, g·bits/8] or [N, K·bits/8], "scales" [N, blocks], and "zero_points" uint8
            [N, ceil(blocks·bits/8)] unless they are left out.
        attributes: "bits" and "block_size".
        dequantizer: runs the node models.
    """
    rows = operands["weight"].shape[0]
    cols = operands["weight"].size // max(rows, 1) * 8 // attributes["bits"]
    weights = np.empty((rows, cols), dtype=np.float32)
    step = max(1, _WEIGHTS_PER_MODEL // max(cols, 1))
    for start in range(0, rows, step):
        part = {role: array[start : start + step] for role, array in operands.items()}
        weights[start : start + step] = dequantizer(_node_model(op, part, attributes, cols))
    return weights


def dequantize_standard(
    node: Any, operands: dict[str, NDArray[Any]], dequantizer: Dequantizer = run_node_model
) -> FloatArray:
    """f32 [N, K] of the operands of a DequantizeLinear, through ONNX Runtime, in parts of whole rows.

    Args:
        node: whose attributes to take.
        operands: "weight" [K, N] or [N, K] with a code in each item, "scales" and perhaps "zero_points".
        dequantizer: runs the node models.
    """
    row_axis = 1 if holds_columns_first(node) else 0
    rows, cols = operands["weight"].shape[row_axis], operands["weight"].shape[1 - row_axis]
    weights = np.empty((rows, cols), dtype=np.float32)
    step = max(1, _WEIGHTS_PER_MODEL // max(cols, 1))
    for start in range(0, rows, step):
        part = {
            role: array[start : start + step]
            if array.ndim == 1
            else array.take(range(start, min(start + step, rows)), row_axis)
            for role, array in operands.items()
        }
        weights[start : start + step] = dequantizer(_standard_model(node, part, row_axis))
    return weights


def _standard_model(node: Any, operands: dict[str, NDArray[Any]], row_axis: int) -> NodeModel:
    """DequantizeLinear, and a Gather of all rows behind it, so that it has the input and output of the others."""
    from onnx import TensorProto, helper

    attributes = {name: attribute.as_int() for name, attribute in node.attributes.items()}
    nodes = [helper.make_node("DequantizeLinear", [*operands], ["W"], **attributes)]
    if row_axis == 1:
        nodes.append(helper.make_node("Transpose", ["W"], ["rows"], perm=[1, 0]))
    nodes.append(helper.make_node("Gather", ["rows" if row_axis == 1 else "W", "X"], ["Y"], axis=0))
    graph = helper.make_graph(
        nodes,
        "dequantize",
        [_input(TensorProto.INT64, [None])],
        [helper.make_tensor_value_info("Y", helper.np_dtype_to_tensor_dtype(operands["scales"].dtype), None)],
        [_initializer(role, array) for role, array in operands.items()],
    )
    two_bits = ir.DataType.from_numpy(operands["weight"].dtype).bitwidth == 2
    opset, ir_version = (25, 13) if two_bits else (21, 10)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)
    rows, cols = operands["weight"].shape[row_axis], operands["weight"].shape[1 - row_axis]
    return NodeModel(model.SerializeToString(), "DequantizeLinear", rows, cols, str(operands["scales"].dtype))


def _input(dtype: int, shape: list[int | None]) -> Any:
    from onnx import helper

    return helper.make_tensor_value_info("X", dtype, shape)  # OpenVINO wants to know the rank


def _initializer(name: str, array: NDArray[Any]) -> Any:
    return ir.to_proto(ir.Tensor(np.ascontiguousarray(array), dtype=ir.DataType.from_numpy(array.dtype), name=name))


def _node_model(op: str, operands: dict[str, NDArray[Any]], attributes: dict[str, int], cols: int) -> NodeModel:
    from onnx import TensorProto, helper, numpy_helper

    rows = operands["weight"].shape[0]
    scale_type = helper.np_dtype_to_tensor_dtype(operands["scales"].dtype)
    multiplies = op == "MatMulNBits"
    if multiplies:
        inputs = ["X", *operands]
        attributes = {**attributes, "K": cols, "N": rows, "accuracy_level": 0}
    else:
        weight, *others = operands
        inputs = [weight, "X", *others]
        attributes = {**attributes, "gather_axis": 0, "quantize_axis": 1}
    graph = helper.make_graph(
        [helper.make_node(op, inputs, ["Y"], domain="com.microsoft", **attributes)],
        "dequantize",
        [_input(scale_type, [None, cols]) if multiplies else _input(TensorProto.INT64, [None])],
        [helper.make_tensor_value_info("Y", scale_type, None)],
        [numpy_helper.from_array(np.ascontiguousarray(array), role) for role, array in operands.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return NodeModel(model.SerializeToString(), op, rows, cols, str(operands["scales"].dtype))
