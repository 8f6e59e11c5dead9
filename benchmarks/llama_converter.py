"""llama.cpp's own Hugging Face converter, of the build that our runtime is: the reference for what a file holds.

The source archive of the pinned `xllamacpp` holds it, `convert_hf_to_gguf.py` with `conversion/` and a gguf-py newer
than PyPI's. It is fetched once into .cache/, by pip. It runs in processes of its own: its gguf never meets ours.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Literal

from benchmarks.llama_quantize import CACHE
from runtime_tests.setup.cache import fill
from runtime_tests.worker.llama_cpp_bindings import PACKAGE, VERSION
from signround_edge.files import sha256_of

BUILD = VERSION.rpartition(".")[2]
SHA256 = "c17ee1163006f70726abb9f72137830818f3d8cb60bfc34cb232d08428eaa22b"  # of the source archive
_TAKEN = ("LICENSE", "convert_hf_to_gguf.py", "conversion/", "gguf-py/")
_RUNNER = Path(__file__).with_name("llama_converter_process.py")

OutType = Literal["f32", "f16", "bf16", "q8_0"]


class ConverterUnavailable(Exception):
    """The converter is not in the cache and cannot be fetched."""


class ConversionFailed(Exception):
    """The converter refused a model; the message holds the last lines of what it said."""


@functools.cache
def why_unavailable() -> str | None:
    """Why the converter cannot run here, None when it can. Fetches it on the first call of a process."""
    if not hasattr(os, "fork"):
        return "the converter's process forks for each model, which this platform cannot"
    try:
        installed_converter()
    except ConverterUnavailable as error:
        return str(error)
    return None


def installed_converter() -> Path:
    """Folder of the converter, fetched if it is not there yet. ConverterUnavailable when that is impossible."""
    return fill(CACHE / f"llama.cpp-b{BUILD}", _fetch)


def _fetch(folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        # pip asks the archive for its metadata, which needs its build tools (seconds) but builds nothing.
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--retries", "1", "--no-deps"]
        command = [*pip, "--no-binary", PACKAGE, "--dest", temporary, f"{PACKAGE}=={VERSION}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            said = " ".join(done.stderr.split())[-300:]
            raise ConverterUnavailable(f"pip cannot fetch the source of {PACKAGE} {VERSION}: {said}")
        (archive,) = Path(temporary).glob("*.tar.gz")
        found = sha256_of(archive)
        assert found == SHA256, f"{archive.name} is another file than when SHA256 was written here ({found})"
        prefix = f"{archive.name.removesuffix('.tar.gz')}/thirdparty/llama.cpp/"
        with tarfile.open(archive) as packed:
            for member in packed:
                member.name = member.name.removeprefix(prefix)
                if member.isfile() and member.name.startswith(_TAKEN):
                    packed.extract(member, folder, filter="data")


class Converter:
    """A process that has the converter loaded, which takes seconds; each model is converted in a fork of it.

    A context manager: the process ends with it.
    """

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        # -I: neither PYTHONPATH nor the folder of this file is on its path.
        command = [sys.executable, "-I", str(_RUNNER), str(installed_converter())]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
        )

    def __enter__(self) -> Converter:
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.communicate()  # closes its input, which ends it

    def convert(
        self, model: Path, out: Path, outtype: OutType = "f32", options: Sequence[str] = (), pre: str | None = None
    ) -> Path:
        """Write `out` as `convert_hf_to_gguf.py MODEL --outfile OUT --outtype OUTTYPE OPTIONS` does.

        Args:
            model: a folder in Hugging Face layout, its config.json with `architectures`.
            pre: `tokenizer.ggml.pre` of a tokenizer that the converter does not know; None makes that an error.
        Raises:
            ConversionFailed: with the end of what the converter said.
        """
        job = {"arguments": [str(model), "--outfile", str(out), "--outtype", outtype, *options], "pre": pre}
        requests, answers = self._pipes()
        requests.write(json.dumps(job) + "\n")
        requests.flush()
        answer = answers.readline()
        said = json.loads(answer) if answer else "its process died"
        if said is not None:
            raise ConversionFailed(f"{model}: {said}")
        return out

    def _pipes(self) -> tuple[IO[str], IO[str]]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        return self._process.stdin, self._process.stdout


def convert(
    model: Path, out: Path, outtype: OutType = "f32", options: Sequence[str] = (), pre: str | None = None
) -> Path:
    """Convert one model; see `Converter.convert`. Takes some seconds: for several models, keep a Converter."""
    with Converter() as converter:
        return converter.convert(model, out, outtype, options, pre)
