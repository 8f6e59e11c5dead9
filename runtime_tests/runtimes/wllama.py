"""wllama: llama.cpp as WebAssembly in a browser, one thread.

It has no access to libggml's dequantizer, so stored weights are compared through llama.cpp on this machine, which is
the same source. The file for one thread is an older llama.cpp than ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from exporters.gguf.container.reader import GgufFile
from runtime_tests.interface import StoredTensor
from runtime_tests.runtimes.llama_cpp import LlamaCppRuntime
from runtime_tests.runtimes.worker_runtime import WorkerRuntime
from runtime_tests.runtimes.worker_session import WorkerSession
from runtime_tests.setup.npm import WLLAMA
from runtime_tests.transports.local import LocalTransport
from runtime_tests.transports.push import files_of
from signround_edge.errors import UserError

_LONGEST_WINDOW = 4096
_LARGEST_FILE = (1 << 31) - 1  # bytes: an ArrayBuffer of a 32-bit WebAssembly


@dataclass(frozen=True)
class WllamaRuntime(WorkerRuntime):
    """llama.cpp in a page."""

    name = "wllama"
    artifact_format = "gguf"

    def unavailable(self) -> str | None:
        """Why it cannot run there, with the way out; None when it can."""
        if isinstance(self.transport, LocalTransport):
            return "it runs in browsers only (--device browser-wasm)"
        return self.transport.unavailable() or WLLAMA.missing_with_way_out()

    def open(self, artifact: Path) -> WorkerSession:
        """Load a GGUF file. Raises UserError when llama.cpp refuses it or the page dies of it."""
        files = files_of(artifact)
        large = [file for file in files if file.stat().st_size > _LARGEST_FILE]
        if large:
            raise UserError(f"{large[0]} is larger than 2 GB, which a browser cannot load; use --split-max-size 500M")
        floats = all(tensor.ggml_type.name == "F32" for tensor in GgufFile.open(artifact).tensors.values())
        options = {"files": [file.name for file in files], "f32": floats, "n_ctx": _LONGEST_WINDOW}
        return WorkerSession(self.name, self.transport, artifact, self.timeout, options, self.digest)

    def stored_tensors(self, artifact: Path) -> Iterator[StoredTensor]:
        """Every tensor through libggml's `to_float` on this machine."""
        return LlamaCppRuntime().stored_tensors(artifact)
