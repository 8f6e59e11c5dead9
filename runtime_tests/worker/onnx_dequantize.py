"""ONNX Runtime's own dequantizer, one quantized node at a time.

A MatMulNBits of accuracy level 0 applied to the identity returns its dequantized weights bit for bit: every output is
one product 1·w plus zeros. So does a QMoE of one expert whose other matrix is the identity, with no activation between
them. GatherBlockQuantized returns its rows directly, and so does a Gather behind DequantizeLinear.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from runtime_tests.worker.onnx_session import cpu_session
from signround_edge.evaluation.metrics import FloatArray

MULTIPLIERS = ("MatMulNBits", "QMoE")  # they are given the identity
IDENTITY_ROWS = 1024  # input features in one run: bounds memory


@dataclass(frozen=True)
class NodeModel:
    """One quantized node as a model of its own: input X, output Y, everything else inside.

    Attributes:
        model: the serialised ModelProto.
        op: "MatMulNBits" or "QMoE" (X is [n, cols], Y [n, rows]), "GatherBlockQuantized" or "DequantizeLinear" with a
            Gather behind it (X is int64 [n], Y [n, cols]).
        rows, cols: shape of the weights.
        dtype: of X and Y of MatMulNBits and QMoE, and of Y otherwise: "float32" or "float16".
    """

    model: bytes
    op: str
    rows: int
    cols: int
    dtype: str


def run_node_model(node: NodeModel) -> FloatArray:
    """f32 [rows, cols] through ONNX Runtime in this process, one thread."""
    session = cpu_session(node.model)
    weights = np.empty((node.rows, node.cols), dtype=np.float32)
    if node.op not in MULTIPLIERS:
        weights[:] = session.run(None, {"X": np.arange(node.rows, dtype=np.int64)})[0]
        return weights
    for start in range(0, node.cols, IDENTITY_ROWS):
        stop = min(start + IDENTITY_ROWS, node.cols)
        identity = np.eye(stop - start, node.cols, k=start, dtype=node.dtype)
        weights[:, start:stop] = session.run(None, {"X": identity})[0].T
    return weights
