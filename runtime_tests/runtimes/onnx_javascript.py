"""ONNX Runtime's JavaScript packages: onnxruntime-web (wasm, in Node and in browsers) and onnxruntime-node (native).

wasm kernels ignore accuracy_level: they compute in f32 whatever it says (measured, docs/LOG.md), so there a graph of
level 4 is its own control.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from runtime_tests.interface import StoredTensor
from runtime_tests.runtimes.onnx_runtime import OnnxRuntime
from runtime_tests.runtimes.worker_session import WorkerSession
from runtime_tests.setup.npm import ONNXRUNTIME_NODE, ONNXRUNTIME_WEB
from runtime_tests.worker.onnxruntime_engine import decoder_config, exported_folder, model_file
from signround_edge.errors import UserError


@dataclass(frozen=True)
class OnnxRuntimeWeb(OnnxRuntime):
    """onnxruntime-web: one thread, execution provider wasm. It has no meaning on this machine without a transport."""

    name = "onnxruntime-web"

    def unavailable(self) -> str | None:
        """Why it cannot run there, with the way out; None when it can."""
        return self.transport.unavailable() or ONNXRUNTIME_WEB.missing_with_way_out()

    def open(self, artifact: Path, accuracy_level: int | None = None) -> WorkerSession:
        """Load a folder or .onnx file; the level makes no difference."""
        model = model_file(artifact)
        options = {
            "model": model.name,
            "external": external_files(model),
            "decoder": decoder_config(exported_folder(model)),
        }
        return WorkerSession(self.name, self.transport, model.parent, self.timeout, options, self.digest)

    def stored_tensors(self, artifact: Path) -> Iterator[StoredTensor]:
        """Every weight through the device's kernels; where only digests come back, through this machine's."""
        if self.digest:
            return OnnxRuntime().stored_tensors(artifact)
        return super().stored_tensors(artifact)


@dataclass(frozen=True)
class OnnxRuntimeNode(OnnxRuntimeWeb):
    """onnxruntime-node: ONNX Runtime's native library in Node, one thread."""

    name = "onnxruntime-node"

    def unavailable(self) -> str | None:
        """Why it cannot run there, with the way out; None when it can."""
        return self.transport.unavailable() or ONNXRUNTIME_NODE.missing_with_way_out()

    def open(self, artifact: Path, accuracy_level: int | None = None) -> WorkerSession:
        """Load a folder or .onnx file. UserError when another accuracy level than the file's own is asked for."""
        if accuracy_level is not None:
            raise UserError(f"{artifact}: onnxruntime-node runs it at its own accuracy level only; use onnxruntime")
        return super().open(artifact)


def external_files(model: Path) -> list[str]:
    """Names of the files beside an .onnx file that hold its tensors' data; UserError when they lie elsewhere."""
    from exporters.onnx.artifact.reader import open_model

    tensors = [value.const_value for value in open_model(model).graph.initializers.values()]
    names = sorted({str(tensor.location) for tensor in tensors if isinstance(tensor, ir.ExternalTensor)})
    if any(Path(name).name != name for name in names):
        raise UserError(f"{model} keeps data in another folder ({names[0]}); export the run again")
    return names
