"""OpenVINO's CPU plugin on this machine, in a worker process: ONNX folders of either kind of operators."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from runtime_tests.runtimes.onnx_runtime import OnnxRuntime
from runtime_tests.runtimes.worker_session import WorkerSession
from runtime_tests.transports.local import LocalTransport


@dataclass(frozen=True)
class OpenVinoRuntime(OnnxRuntime):
    """OpenVINO, one thread, in f32.

    Stored weights are read through OpenVINO: each quantized node as a model of its own, read by its ONNX frontend and
    computed by its kernels. It has no accuracy levels, so a graph of level 4 is its own control.
    """

    name = "openvino"

    def unavailable(self) -> str | None:
        """Why it cannot run there, with the way out; None when it can."""
        if not isinstance(self.transport, LocalTransport):
            return "it runs on this machine only (--device cpu-openvino)"
        if importlib.util.find_spec("openvino") is None:
            return "the package openvino is not installed (pip install 'signround-edge[openvino]')"
        return None

    def open(self, artifact: Path, accuracy_level: int | None = None) -> WorkerSession:
        """Load a folder or .onnx file; the level makes no difference. UserError when OpenVINO refuses it."""
        return WorkerSession(self.name, self.transport, artifact, self.timeout, {}, self.digest)
