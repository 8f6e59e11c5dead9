"""ONNX Runtime on the CPU, in a worker process."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from runtime_tests.interface import StoredTensor
from runtime_tests.runtimes.worker_session import WorkerSession
from runtime_tests.transports.local import DEFAULT_TIMEOUT, LocalWorker


@dataclass(frozen=True)
class OnnxRuntime:
    """ONNX Runtime on this machine's CPU, one thread.

    Attributes:
        timeout: seconds a request may take before the worker counts as hung.
    """

    timeout: float = DEFAULT_TIMEOUT
    name = "onnxruntime"
    artifact_format = "onnx"

    def unavailable(self) -> str | None:
        """Why it cannot run here, with the way out; None when it can."""
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
        return WorkerSession(self.name, artifact, self.timeout, options)

    def stored_tensors(self, artifact: Path) -> Iterator[StoredTensor]:
        """Every weight of the run: quantized ones [N, K] through ONNX Runtime's kernels, floats as they are stored."""
        from exporters.onnx.reader import read_tensors

        types = {name: kind for name, kind, _, _ in read_tensors(artifact)}
        with LocalWorker(str(artifact), self.timeout) as worker:
            worker.call("onnx_weights", artifact=str(artifact.absolute()))
            while (reply := worker.call("next_weight")).header["name"] is not None:
                name = reply.header["name"]
                yield StoredTensor(name, reply.arrays["weights"], types.get(name, "unknown"))
