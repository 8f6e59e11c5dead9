"""ONNX Runtime on a CPU, in a worker process here or on a device."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from runtime_tests.interface import StoredTensor
from runtime_tests.runtimes.worker_runtime import WorkerRuntime
from runtime_tests.runtimes.worker_session import WorkerSession
from runtime_tests.transports.local import LocalTransport
from runtime_tests.transports.reconnecting import ReconnectingWorker
from runtime_tests.worker.onnx_dequantize import NodeModel
from signround_edge.evaluation.metrics import FloatArray


@dataclass(frozen=True)
class OnnxRuntime(WorkerRuntime):
    """ONNX Runtime on a CPU, one thread."""

    name = "onnxruntime"
    artifact_format = "onnx"

    def unavailable(self) -> str | None:
        """Why it cannot run here, with the way out; None when it can."""
        if not isinstance(self.transport, LocalTransport):
            return self.transport.unavailable()
        if importlib.util.find_spec("onnxruntime") is None:
            return "the package onnxruntime is not installed (pip install onnxruntime)"
        return None

    def open(self, artifact: Path, accuracy_level: int | None = None) -> WorkerSession:
        """Load a folder of onnxruntime-genai's builder, or its .onnx file.

        Args:
            accuracy_level: run every MatMulNBits at this level instead of the file's own: 0 computes in f32, which
                shows the graph without the activations' rounding to int8.
        Raises:
            UserError: ONNX Runtime refuses the file or dies of it.
        """
        options = {} if accuracy_level is None else {"accuracy_level": accuracy_level}
        return WorkerSession(self.name, self.transport, artifact, self.timeout, options, self.digest)

    def stored_tensors(self, artifact: Path) -> Iterator[StoredTensor]:
        """Every weight of the run: quantized ones [N, K] through ONNX Runtime's kernels, floats as they are stored."""
        from exporters.onnx.artifact.reader import read_tensors
        from runtime_tests.runtimes.onnx_weights import dequantize_through_runtime

        types = {name: kind for name, kind, _, _ in read_tensors(artifact)}
        with self.worker(artifact) as worker:
            for name, weights in dequantize_through_runtime(
                artifact, lambda node: _dequantize(worker, self.name, node)
            ):
                yield StoredTensor(name, weights, types.get(name, "unknown"))


def _dequantize(worker: ReconnectingWorker, runtime: str, node: NodeModel) -> FloatArray:
    model = {"model": np.frombuffer(node.model, dtype=np.uint8)}
    header = {"node_op": node.op, "rows": node.rows, "cols": node.cols, "dtype": node.dtype}
    return worker.call("dequantize_node", model, runtime=runtime, **header).arrays["weights"]
