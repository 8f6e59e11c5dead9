"""onnxruntime-genai on this machine's CPU, in a worker process: the folder as apps load it."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from runtime_tests.runtimes.onnx_runtime import OnnxRuntime
from runtime_tests.runtimes.worker_session import WorkerSession
from runtime_tests.transports.local import LocalTransport


@dataclass(frozen=True)
class OnnxRuntimeGenai(OnnxRuntime):
    """onnxruntime-genai, one thread. Stored weights are read through ONNX Runtime, on which it stands."""

    name = "onnxruntime-genai"

    def unavailable(self) -> str | None:
        """Why it cannot run there, with the way out; None when it can."""
        if not isinstance(self.transport, LocalTransport):
            return "it runs on this machine only (--device cpu-genai)"
        if importlib.util.find_spec("onnxruntime_genai") is None:
            return "the package onnxruntime-genai is not installed (pip install onnxruntime-genai)"
        return None

    def open(self, artifact: Path, accuracy_level: int | None = None) -> WorkerSession:
        """Load a folder. Another accuracy level than the file's own, for a control, is run by plain ONNX Runtime."""
        if accuracy_level is not None:
            return OnnxRuntime(self.timeout, self.transport, self.digest).open(artifact, accuracy_level)
        return super().open(artifact)
