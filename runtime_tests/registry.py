"""Runtimes by name: ours, and those that other packages add through entry points."""

from __future__ import annotations

from importlib.metadata import entry_points

from runtime_tests.interface import Runtime
from runtime_tests.runtimes.llama_cpp import LlamaCppRuntime
from runtime_tests.runtimes.onnx_runtime import OnnxRuntime

RUNTIMES = "signround_edge.runtimes"


def find_runtimes() -> dict[str, Runtime]:
    """Every runtime by its `name`. Ours are there too when the packages run from a source tree."""
    ours: tuple[Runtime, ...] = (LlamaCppRuntime(), OnnxRuntime())
    found = {runtime.name: runtime for runtime in ours}
    for entry in entry_points(group=RUNTIMES):
        if not entry.value.startswith("runtime_tests."):
            runtime: Runtime = entry.load()()
            found[runtime.name] = runtime
    return found
