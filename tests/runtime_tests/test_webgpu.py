"""onnxruntime-web's WebGPU provider in headless Chromium: its figures, and what it leaves to the CPU without a word."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from runtime_tests.runtimes.onnx_runtime import OnnxRuntime, _dequantize
from runtime_tests.runtimes.onnx_webgpu import OnnxRuntimeWebGpu, WebGpuSession, floats_on_cpu
from runtime_tests.runtimes.onnx_weights import dequantize_operands
from runtime_tests.transports.local import LocalTransport
from runtime_tests.transports.lookup import transport_to
from runtime_tests.verify import verify
from signround_edge.errors import UserError
from signround_edge.run_directory import RunDirectory
from tests.runtime_tests.javascript_support import ready_device

# Longer than the four threads of SwiftShader's subgroups: from there on its attention was once wrong.
TOKENS = np.random.default_rng(0).integers(0, 300, 40).astype(np.int32)


@pytest.fixture
def webgpu() -> Iterator[OnnxRuntimeWebGpu]:
    profile = ready_device("browser-webgpu")
    with contextlib.closing(transport_to(profile)) as transport:
        yield OnnxRuntimeWebGpu().on(profile, transport)


def insert(folder: Path, operator: str, behind: str) -> None:
    """Put a node of floats behind the node of that name."""
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    index = next(i for i, node in enumerate(model.graph.node) if node.name == behind)
    node = model.graph.node[index]
    output = node.output[0]
    node.output[0] = f"{output}/before"
    model.graph.node.insert(index + 1, onnx.helper.make_node(operator, [node.output[0]], [output], name="/inserted"))
    onnx.save(model, folder / "model.onnx")


def test_only_integers_may_stay_on_the_cpu(onnx_folder: Path) -> None:
    model = onnx_folder / "model.onnx"
    by_type = {node.op_type: node.name for node in onnx.load(model, load_external_data=False).graph.node}
    lengths = [["ReduceSum", by_type["ReduceSum"]], ["Shape", by_type["Shape"]]]
    floats = [("MatMulNBits", by_type["MatMulNBits"]), ("Mul", by_type["Mul"]), ("FusedSomething", "of no file")]
    assert floats_on_cpu(model, {"CPUExecutionProvider": lengths}) == []
    assert floats_on_cpu(model, {"WebGpuExecutionProvider": [list(pair) for pair in floats]}) == []
    assert floats_on_cpu(model, {"CPUExecutionProvider": [*lengths, *map(list, floats)]}) == floats


def test_it_is_for_browsers_that_were_started_with_a_gpu() -> None:
    reason = OnnxRuntimeWebGpu(transport=LocalTransport()).unavailable()
    assert reason == "it runs in a browser with WebGPU only (--device browser-webgpu)"


@pytest.mark.full
def test_verify_passes_on_webgpu_and_names_the_adapter(
    webgpu: OnnxRuntimeWebGpu, run: RunDirectory, onnx_folder: Path, text: Path
) -> None:
    report = verify(run, [onnx_folder], text, devices=["browser-webgpu"], n_ctx=64, max_windows=2, log=str)
    (runtime,) = report.runtimes
    assert (runtime.name, runtime.status, runtime.gate, runtime.reason) == ("onnxruntime-webgpu", "pass", "exact", None)
    assert report.weights_exact
    assert runtime.notes[0].startswith("WebGPU adapter: ")
    assert "of integers on the CPU" in runtime.notes[0]


@pytest.mark.full
def test_its_logits_are_those_of_onnx_runtime(webgpu: OnnxRuntimeWebGpu, onnx_folder: Path) -> None:
    with OnnxRuntime().open(onnx_folder) as session:
        expected = session.logits(TOKENS)
    with webgpu.open(onnx_folder) as session:
        assert isinstance(session, WebGpuSession)
        assert float(np.abs(session.logits(TOKENS) - expected).max()) < 1e-3


@pytest.mark.full
def test_a_node_that_webgpu_lacks_is_a_refusal_and_no_verdict(
    webgpu: OnnxRuntimeWebGpu, onnx_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(onnx_folder, tmp_path / "onnx")
    insert(folder, "Softsign", behind="/model/layers.0/mlp/Mul")
    with pytest.raises(UserError, match=r"WebGPU does not run 1 of its nodes \(Softsign\), such as /inserted"):
        webgpu.open(folder)


@pytest.mark.full
def test_its_kernels_dequantize_bit_for_bit(webgpu: OnnxRuntimeWebGpu) -> None:
    with webgpu.worker(Path("node")) as worker:  # one browser for all
        for op, bits, block_size in [("MatMulNBits", 2, 16), ("MatMulNBits", 8, 256), ("GatherBlockQuantized", 4, 32)]:
            operands, attributes = random_operands(op, bits, block_size), {"bits": bits, "block_size": block_size}
            found = dequantize_operands(op, operands, attributes, lambda node: _dequantize(worker, webgpu.name, node))
            assert np.array_equal(found, dequantize_operands(op, operands, attributes)), (op, bits, block_size)


def random_operands(op: str, bits: int, block_size: int) -> dict[str, NDArray[Any]]:
    rng, rows, cols = np.random.default_rng(0), 24, 512
    blocks = cols // block_size
    shape = (rows, blocks, block_size * bits // 8) if op == "MatMulNBits" else (rows, cols * bits // 8)
    return {
        "weight": rng.integers(0, 256, shape, dtype=np.uint8),
        "scales": rng.normal(size=(rows, blocks)).astype(np.float16).astype(np.float32),
        "zero_points": rng.integers(0, 256, (rows, -(-blocks * bits // 8)), dtype=np.uint8),
    }
