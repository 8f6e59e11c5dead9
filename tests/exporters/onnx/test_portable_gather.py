"""The function that stands for GatherBlockQuantized gives the operator's own values, bit for bit."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from exporters.onnx.passes.portable_gather import use_portable_gathers


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("blocks", [1, 3, 4])
def test_it_equals_the_operator(bits: int, blocks: int) -> None:
    model = gather_model(bits, block_size=16, blocks=blocks)
    tokens = np.array([[3, 0, 6], [6, 5, 1]])
    theirs = run(model, tokens)
    use_portable_gathers(model)
    ours = run(model, tokens)
    assert theirs.shape == (2, 3, 16 * blocks)
    assert np.array_equal(ours.view(np.uint32), theirs.view(np.uint32))
    assert len(np.unique(ours)) > 4


def gather_model(bits: int, block_size: int, blocks: int, rows: int = 7) -> ir.Model:
    """A model of one GatherBlockQuantized with random operands."""
    generator = np.random.default_rng(bits * 10 + blocks)
    width = -(-blocks * bits // 8)
    operands = {
        "codes": generator.integers(0, 256, (rows, blocks * block_size * bits // 8), dtype=np.uint8),
        "scales": generator.normal(size=(rows, blocks)).astype(np.float32),
        "zeros": generator.integers(0, 256, (rows, width), dtype=np.uint8),
    }
    tokens = ir.Value(name="tokens", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["batch", "length"]))
    values = [
        ir.Value(name=name, type=ir.TensorType(ir.tensor(array).dtype), shape=ir.Shape(array.shape), const_value=tensor)
        for name, array in operands.items()
        for tensor in [ir.tensor(array, name=name)]
    ]
    codes, scales, zeros = values
    attributes = {"bits": bits, "block_size": block_size, "gather_axis": 0, "quantize_axis": 1}
    node = ir.node("GatherBlockQuantized", [codes, tokens, scales, zeros], attributes, domain="com.microsoft")
    output = node.outputs[0]
    output.name, output.type = "rows", ir.TensorType(ir.DataType.FLOAT)
    opsets = {"": 21, "com.microsoft": 1}
    graph = ir.Graph([tokens], [output], nodes=[node], initializers=values, opset_imports=opsets, name="gather")
    return ir.Model(graph, ir_version=10)


def run(model: ir.Model, tokens: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    return np.asarray(session.run(None, {"tokens": tokens})[0])
