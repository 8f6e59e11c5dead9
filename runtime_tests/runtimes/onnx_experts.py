"""The matrices of mixtures of experts through ONNX Runtime's QMoE itself: one expert at a time, in models of one node.

A node multiplies by two matrices. The one that is not asked for is an identity of the same bits and block size, the
activation is none, and the only expert of the node has the weight 1, so that every output is one product 1·w plus zeros
(see `runtime_tests.worker.onnx_dequantize`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporters.onnx.artifact.reader import Artifact
from exporters.onnx.bindings import QUANTIZED_INPUTS, quantized_initializers
from exporters.onnx.packing import pack_bits, unpack_bits
from runtime_tests.runtimes.onnx_refusal import refusal_said
from runtime_tests.worker.onnx_dequantize import NodeModel
from signround_edge.evaluation.metrics import FloatArray

Operands = dict[str, NDArray[Any]]


def dequantize_experts(
    artifact: Artifact, node: Any, part: str, dequantizer: Callable[[NodeModel], FloatArray]
) -> Iterator[tuple[str, FloatArray]]:
    """(name as in `Binding`, f32 [N, K]) of each expert's matrix `part`, "fc1" or "fc2", of a QMoE node."""
    bits, block_size, (experts, rows, cols) = artifact.form(node, part)
    stored = {role: artifact.array(name) for role, name in quantized_initializers(node, part).items()}
    for expert in range(experts):
        operands = {role: array[expert] for role, array in stored.items()}
        operands["scales"] = operands["scales"].astype(np.float32)  # as the graph does before it computes
        weights = np.empty((rows, cols), dtype=np.float32)
        with refusal_said(artifact.path, node, "export it with --layout transformers.js, whose graph has no QMoE"):
            for place, model in _models(operands, part, bits, block_size, (rows, cols)):
                weights[place] = dequantizer(model)
        yield f"{node.name}/{part}/{expert}", weights


def _models(
    operands: Operands, part: str, bits: int, block_size: int, shape: tuple[int, int]
) -> Iterator[tuple[tuple[slice, slice], NodeModel]]:
    """Where a part of a matrix [N, K] belongs, and the node that gives it.

    A node's tokens are as long as its outputs. So rows of FC1 are taken K at a time, and columns of FC2 N at a time:
    as many as an identity beside them can hand on.
    """
    rows, cols = shape
    whole = slice(None)
    if part == "fc1":
        step = cols // block_size * block_size
        for start in range(0, rows, step):
            stop = min(rows, start + step)
            some = {role: array[start:stop] for role, array in operands.items()}
            yield (slice(start, stop), whole), _model(some, part, bits, block_size, (stop - start, cols))
    else:
        step = rows // block_size * block_size
        for start in range(0, cols, step):
            stop = min(cols, start + step)
            some = _columns(operands, slice(start // block_size, stop // block_size), bits, block_size)
            yield (whole, slice(start, stop)), _model(some, part, bits, block_size, (rows, stop - start))


def _columns(operands: Operands, blocks: slice, bits: int, block_size: int) -> Operands:
    """The operands of some blocks of columns."""
    width = block_size * bits // 8
    scales = operands["scales"]
    some = {"weight": operands["weight"][:, blocks.start * width : blocks.stop * width], "scales": scales[:, blocks]}
    if "zero_points" in operands:  # bytes hold those of several blocks
        zeros = unpack_bits(operands["zero_points"], bits, scales.shape[1])
        some["zero_points"] = pack_bits(zeros[:, blocks], bits)
    return some


def _identity(rows: int, cols: int, bits: int, block_size: int) -> Operands:
    """Operands whose weights are 1 on the diagonal and 0 elsewhere."""
    zero = 1 << (bits - 1)
    codes = np.full((rows, cols), zero, dtype=np.uint8)
    np.fill_diagonal(codes, zero + 1)
    blocks = cols // block_size
    zeros = np.full((rows, blocks), zero, dtype=np.uint8)
    scales = np.ones((rows, blocks), dtype=np.float32)
    return {"weight": pack_bits(codes, bits), "scales": scales, "zero_points": pack_bits(zeros, bits)}


def _model(operands: Operands, part: str, bits: int, block_size: int, shape: tuple[int, int]) -> NodeModel:
    """X f32 [n, K] → Y f32 [n, N], the products of one matrix [N, K].

    Tokens of the node are as long as its outputs: K of FC1, N of FC2, whose identity takes the first ones of a token.
    """
    from onnx import TensorProto, helper, numpy_helper

    rows, cols = shape
    hidden, inner = (cols, rows) if part == "fc1" else (rows, cols)
    both = {
        "fc1": operands if part == "fc1" else _identity(inner, hidden, bits, block_size),
        "fc2": operands if part == "fc2" else _identity(hidden, inner, bits, block_size),
    }
    inputs = ["tokens", "router"] + [""] * 11
    constants: Operands = {"ones": np.ones((cols, 1), np.float32), "widen": np.eye(cols, hidden, dtype=np.float32)}
    constants["kept"] = np.arange(rows, dtype=np.int64)
    for name, matrix in both.items():
        for role, array in matrix.items():
            place = QUANTIZED_INPUTS[f"QMoE/{name}"][role]
            inputs[place] = f"{name}_{role}"
            constants[inputs[place]] = np.ascontiguousarray(array)[None]
    nodes = [
        helper.make_node("MatMul", ["X", "ones"], ["router"]),  # of one expert any score gives the weight 1
        helper.make_node("MatMul", ["X", "widen"], ["tokens"]),
        helper.make_node(
            "QMoE", inputs, ["all"], domain="com.microsoft", expert_weight_bits=bits, block_size=block_size, k=1,
            activation_type="identity", swiglu_fusion=0,
        ),
        helper.make_node("Gather", ["all", "kept"], ["Y"], axis=1),
    ]  # fmt: skip
    graph = helper.make_graph(
        nodes,
        "dequantize",
        [helper.make_tensor_value_info("X", TensorProto.FLOAT, [None, cols])],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return NodeModel(model.SerializeToString(), "QMoE", rows, cols, "float32")
