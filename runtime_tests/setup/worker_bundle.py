"""The worker's own code as one zip file that Python imports from: all that it needs besides its packages."""

from __future__ import annotations

import hashlib
import io
import zipfile
from functools import cache
from pathlib import Path

from runtime_tests.cache import cache_folder, fill

# What `runtime_tests.worker` imports on a device, from the folder that holds our packages.
_MODULES = (
    "signround_edge/__init__.py",
    "signround_edge/errors.py",
    "signround_edge/evaluation/metrics.py",
    "runtime_tests/__init__.py",
    "runtime_tests/worker/digest.py",
    "runtime_tests/worker/__main__.py",
    "runtime_tests/transports/__init__.py",
    "runtime_tests/worker/protocol.py",
    "runtime_tests/worker/remote_store.py",
    "runtime_tests/runtimes/__init__.py",
    "runtime_tests/worker/llama_cpp_bindings.py",
    "runtime_tests/worker/llama_cpp_engine.py",
    "runtime_tests/worker/onnx_dequantize.py",
    "runtime_tests/worker/onnx_engine.py",
    "runtime_tests/worker/onnx_session.py",
)
_DATE = (2026, 1, 1, 0, 0, 0)  # the same code gives the same bytes


@cache
def worker_bundle() -> Path:
    """The zip file, in the cache under its hash."""
    root = Path(__file__).resolve().parents[2]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in _MODULES:
            archive.writestr(zipfile.ZipInfo(name, _DATE), (root / name).read_bytes())
    content = buffer.getvalue()
    folder = cache_folder() / "worker" / hashlib.sha256(content).hexdigest()[:16]
    return fill(folder, lambda temporary: _write(temporary / "worker.zip", content)) / "worker.zip"


def _write(file: Path, content: bytes) -> None:
    file.write_bytes(content)
