"""The worker's own code as one zip file that Python imports from: all that it needs besides its packages.

That is the folder `runtime_tests/worker`, whatever it holds, and the two modules outside that it may import.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from functools import cache
from pathlib import Path

from runtime_tests.setup.cache import cache_folder, fill

_WORKER = "runtime_tests/worker"
_OUTSIDE = ("signround_edge/errors.py", "signround_edge/evaluation/metrics.py")
_DATE = (2026, 1, 1, 0, 0, 0)  # the same code gives the same bytes


@cache
def worker_bundle() -> Path:
    """The zip file, in the cache under its hash."""
    root = Path(__file__).resolve().parents[2]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in _names(root):
            archive.writestr(zipfile.ZipInfo(name, _DATE), (root / name).read_bytes())
    content = buffer.getvalue()
    folder = cache_folder() / "worker" / hashlib.sha256(content).hexdigest()[:16]
    return fill(folder, lambda temporary: _write(temporary / "worker.zip", content)) / "worker.zip"


def _names(root: Path) -> list[str]:
    """The bundle's files, relative to the folder that holds our packages: modules, and the packages around them."""
    modules = {file.relative_to(root) for file in (root / _WORKER).glob("*.py")} | {Path(name) for name in _OUTSIDE}
    packages = {folder / "__init__.py" for file in modules for folder in file.parents if folder.parts}
    return sorted(file.as_posix() for file in modules | packages)


def _write(file: Path, content: bytes) -> None:
    file.write_bytes(content)
