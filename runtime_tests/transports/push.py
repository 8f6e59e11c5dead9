"""Bringing files to a store by their hash: what is there already is not sent, an interrupted push goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from signround_edge.files import sha256_of

_CHUNK = 1 << 20

# (file's sha256, its size) → bytes there;  (sha256, size, offset, data) → bytes there
Have = Callable[[str, int], int]
Put = Callable[[str, int, int, bytes], int]


def files_of(artifact: Path) -> list[Path]:
    """The files that belong to an artifact: itself, the other parts of a split GGUF, or those in its folder.

    An .ort file holds its tensors; what its graph leaves open (the shape of the cache) stands beside it.
    """
    if artifact.is_dir():
        return sorted(path for path in [*artifact.iterdir(), *artifact.glob("onnx/*")] if path.is_file())
    if artifact.suffix == ".onnx":
        return files_of(artifact.parent)
    if artifact.suffix == ".ort":
        return [artifact, *artifact.parent.glob("genai_config.json")]
    from exporters.gguf.container.splits import model_files  # late: exporters load torch, which `devices` does not need

    return [path for path in model_files(artifact) if path.is_file()] or [artifact]


def push_file(file: Path, have: Have, put: Put) -> str:
    """Push one file unless it is there; its sha256."""
    sha256, size = sha256_of(file), file.stat().st_size
    there = have(sha256, size)
    with open(file, "rb") as stream:
        while there < size or (size == 0 and there == 0):
            stream.seek(there)
            there = put(sha256, size, there, stream.read(_CHUNK))
            if size == 0:
                break
    return sha256
