"""ONNX Runtime's own dequantizer, weight by weight.

A MatMulNBits of accuracy level 0 applied to the identity returns its dequantized weights bit for bit: every output is
one product 1·w plus zeros. So each node of an artifact is run alone, with the artifact's own operands.
GatherBlockQuantized returns them directly.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporters.onnx.bindings import quantized_initializers, scales_cast
from exporters.onnx.reader import Artifact, open_artifact, stored_floats
from exporters.onnx.sidecar import SIDECAR
from signround_edge.errors import UserError

FloatArray = NDArray[np.float32]

# At most this many weights in one session, and this many input features in one run: bounds memory to some 300 MB.
_WEIGHTS_PER_SESSION = 1 << 25
_IDENTITY_ROWS = 1024


def dequantize_through_runtime(artifact: Path, threads: int = 1) -> Iterator[tuple[str, FloatArray]]:
    """Every stored weight of an artifact, one at a time: (name, f32 weights).

    Quantized ones are named by their node and are [N, K]; the float ones that hold a parameter follow as they are
    stored (names and order as in `exporters.onnx.reader.iter_expected`).

    Args:
        artifact: the folder or the .onnx file.
        threads: threads of ONNX Runtime.
    Raises:
        UserError: the file is broken, or ONNX Runtime refuses a node.
    """
    opened = open_artifact(artifact)
    for node in opened.quantized_nodes():
        yield node.name or "", dequantize_node(opened, node, threads)
    if (opened.path.parent / SIDECAR).is_file():
        yield from stored_floats(opened)


def dequantize_node(artifact: Artifact, node: Any, threads: int = 1) -> FloatArray:
    """f32 [N, K] of one MatMulNBits or GatherBlockQuantized node (an `onnx_ir.Node`)."""
    operands = {role: artifact.array(name) for role, name in quantized_initializers(node).items()}
    if scales_cast(node) is not None:
        operands["scales"] = operands["scales"].astype(np.float32)  # as the graph does before it computes
    attributes = {name: artifact.attribute(node, name) for name in ("bits", "block_size")}
    try:
        return dequantize_operands(node.op_type, operands, attributes, threads)
    except Exception as error:  # onnxruntime's error classes share no base but Exception
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{artifact.path}: ONNX Runtime refuses the weights of node {node.name} ({reason}); export the run again"
        ) from error


def dequantize_operands(
    op: str, operands: dict[str, NDArray[Any]], attributes: dict[str, int], threads: int = 1
) -> FloatArray:
    """f32 [N, K] of stored operands through ONNX Runtime.

    Args:
        op: "MatMulNBits" or "GatherBlockQuantized".
        operands: "weight" uint8 [N, blocks, g·bits/8] or [N, K·bits/8], "scales" [N, blocks], and "zero_points" uint8
            [N, ceil(blocks·bits/8)] unless they are left out.
        attributes: "bits" and "block_size".
        threads: threads of ONNX Runtime.
    """
    rows = operands["weight"].shape[0]
    cols = operands["weight"].size // max(rows, 1) * 8 // attributes["bits"]
    weights = np.empty((rows, cols), dtype=np.float32)
    step = max(1, _WEIGHTS_PER_SESSION // max(cols, 1))
    run = _matmul_rows if op == "MatMulNBits" else _gather_rows
    for start in range(0, rows, step):
        part = {role: array[start : start + step] for role, array in operands.items()}
        run(part, attributes, weights[start : start + step], threads)
    return weights


def _matmul_rows(operands: dict[str, NDArray[Any]], attributes: dict[str, int], out: FloatArray, threads: int) -> None:
    rows, cols = out.shape
    session = _session(
        "MatMulNBits", ["X", *operands], {**attributes, "K": cols, "N": rows, "accuracy_level": 0}, operands, threads
    )
    scale_type = operands["scales"].dtype
    for start in range(0, cols, _IDENTITY_ROWS):
        stop = min(start + _IDENTITY_ROWS, cols)
        identity = np.eye(stop - start, cols, k=start, dtype=scale_type)
        out[:, start:stop] = session.run(None, {"X": identity})[0].T


def _gather_rows(operands: dict[str, NDArray[Any]], attributes: dict[str, int], out: FloatArray, threads: int) -> None:
    weight, *others = operands
    session = _session(
        "GatherBlockQuantized",
        [weight, "X", *others],
        {**attributes, "gather_axis": 0, "quantize_axis": 1},
        operands,
        threads,
    )
    out[:] = session.run(None, {"X": np.arange(out.shape[0], dtype=np.int64)})[0]


def _session(
    op: str, inputs: list[str], attributes: dict[str, int], operands: dict[str, NDArray[Any]], threads: int
) -> Any:
    """A session of one node whose input X is fed and whose other inputs are initializers."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    scale_type = helper.np_dtype_to_tensor_dtype(operands["scales"].dtype)
    graph = helper.make_graph(
        [helper.make_node(op, inputs, ["Y"], domain="com.microsoft", **attributes)],
        "dequantize",
        [helper.make_tensor_value_info("X", scale_type if op == "MatMulNBits" else TensorProto.INT64, None)],
        [helper.make_tensor_value_info("Y", scale_type, None)],
        [numpy_helper.from_array(np.ascontiguousarray(array), role) for role, array in operands.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = threads
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
