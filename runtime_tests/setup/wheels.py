"""Python packages for another machine: pinned wheels unpacked into a folder of the cache, as a worker there needs them.

pip on this machine chooses and unpacks them, so that the other machine needs neither pip nor a network.
"""

from __future__ import annotations

import shutil
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

from runtime_tests.setup.cache import cache_folder, fill
from runtime_tests.setup.requirement import Log, run_tool
from runtime_tests.worker.llama_cpp_bindings import PACKAGE, VERSION

# The packages that `runtime_tests.worker` imports, and the versions that the tolerances were measured with.
PINNED = (
    "numpy==2.4.6",
    f"{PACKAGE}=={VERSION}",
    "onnxruntime==1.31.1",
    "flatbuffers==25.12.19",
    "protobuf==7.36.2",
    "onnx==1.23.2",  # and the next two: graphs that are changed before they run
    "ml_dtypes==0.6.0",
    "typing_extensions==4.16.0",
)
_GLIBC = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_26", "manylinux_2_24", "manylinux_2_17", "manylinux2014")
_NEVER_IMPORTED = ("numpy/**/tests", "numpy/_core/include", "onnx/backend/test", "onnxruntime/transformers")
_EDITION = "1"  # of what a folder holds; raise it when PINNED or the way of installing changes


@dataclass(frozen=True)
class WorkerPackages:
    """The worker's packages for one kind of Linux machine.

    Attributes:
        machine: as `platform.machine()` says it there ("aarch64", "x86_64").
        python: the interpreter's version there, such as "3.11".
    """

    machine: str
    python: str

    @property
    def folder(self) -> Path:
        """What belongs on the other interpreter's path."""
        return cache_folder() / "wheels" / f"{self.machine}-py{self.python}-{_EDITION}"

    def missing(self) -> str | None:
        """See `Requirement`."""
        return None if self.folder.is_dir() else f"the worker's packages for {self.machine} are not in the cache"

    def command(self) -> str | None:
        """See `Requirement`: pip is always at hand."""
        return None

    def install(self, log: Log) -> None:
        """`pip install --target`, wheels of that platform only."""
        log(f"pip install {' '.join(PINNED)} for {self.machine}, Python {self.python}")
        fill(self.folder, self._install)

    def archive(self) -> Path:
        """The folder as a .tar.gz, for a machine that does not see this one's files; made, and got, when needed."""
        self.install(lambda _line: None)
        folder = self.folder.with_name(f"{self.folder.name}-archive")
        return fill(folder, lambda temporary: _pack(self.folder, temporary / "packages.tar.gz")) / "packages.tar.gz"

    def _install(self, folder: Path) -> None:
        platforms = [option for tag in _GLIBC for option in ("--platform", f"{tag}_{self.machine}")]
        target = ["--python-version", self.python, "--implementation", "cp", "--only-binary=:all:", "--no-deps"]
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-compile", "--disable-pip-version-check"]
        run_tool([*pip, "--target", str(folder), *platforms, *target, *PINNED], "pip")
        for pattern in _NEVER_IMPORTED:
            for found in folder.glob(pattern):
                shutil.rmtree(found)


def _pack(folder: Path, archive: Path) -> None:
    with tarfile.open(archive, "w:gz", compresslevel=3) as tar:
        tar.add(folder, arcname=".", filter=lambda info: None if info.name.endswith("__pycache__") else info)
