"""Reading what ONNX Runtime's quantizers write."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from benchmarks.onnx_peers import quantize, read_weights


@pytest.mark.parametrize("inputs", [pytest.param(64, marks=pytest.mark.full), 72])
def test_weights_are_read_as_they_were_also_where_rows_end_within_a_block(tmp_path: Path, inputs: int) -> None:
    weight = np.random.default_rng(1).standard_normal((inputs, 48)).astype(np.float32)  # [in, out], as MatMul has it
    name = "model.layers.0.mlp.up_proj.MatMul.weight"
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", name], ["y"], name="/model/layers.0/mlp/up_proj/MatMul")],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", inputs])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 48])],
        [numpy_helper.from_array(weight, name)],
    )
    opsets = [helper.make_opsetid("", 21)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / "float.onnx")
    quantize(tmp_path / "float.onnx", tmp_path / "out" / "model.onnx", "default-asym", bits=8, block_size=32)
    found = read_weights(tmp_path / "out" / "model.onnx", whole=False).weights
    (read,) = found.values()
    assert list(found) == ["model.layers.0.mlp.up_proj.weight"]
    np.testing.assert_allclose(read.numpy(), weight.T, atol=0.02)
