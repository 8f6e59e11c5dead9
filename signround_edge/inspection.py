"""`inspect`: what a run directory or an artifact holds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from signround_edge.errors import UserError
from signround_edge.manifest import TensorEntry
from signround_edge.plugins import exporter_of


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of an artifact, as `inspect` lists it.

    Attributes:
        name: the artifact's name of the tensor.
        type: the artifact's name of its format ("Q4_0", "MatMulNBits-4x32", "F32").
        shape: as in the Hugging Face model, outermost first.
        bytes: stored bytes, scale fields included.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class Inspection:
    """Tensors of one thing on disk.

    Attributes:
        format: "run", "gguf" or "onnx".
        tensors: each tensor's name, type, shape and stored bytes.
        scheme: the run's scheme; None for artifacts.
        source_check: how the run's source was compared with transformers, in a line; None for artifacts.
        calibration: the run's tokens a sample, "seqlen", and the BOS token in front of each, "bos" (None: its tokenizer
            adds none); None for artifacts, and for runs of versions that did not record it.
    """

    format: str
    tensors: list[TensorInfo]
    scheme: str | None = None
    source_check: str | None = None
    calibration: dict[str, int | None] | None = None

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensor data."""
        return sum(t.bytes for t in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits a parameter; a tensor of 0 bytes shares another one's data and counts once."""
        return 8 * self.total_bytes / max(1, sum(math.prod(t.shape) for t in self.tensors if t.bytes))

    def to_json(self) -> dict[str, Any]:
        """The contract of `inspect --json`."""
        return {
            "format": self.format,
            **({"scheme": self.scheme} if self.scheme else {}),
            **({"source_check": self.source_check} if self.source_check else {}),
            **({"calibration": self.calibration} if self.calibration else {}),
            "total_bytes": self.total_bytes,
            "bits_per_weight": self.bits_per_weight,
            "tensors": [{**vars(t), "shape": list(t.shape)} for t in self.tensors],
        }


def inspect(path: Path) -> Inspection:
    """Read the headers of a run directory or artifact; UserError when it is neither, or broken."""
    if not path.exists():
        raise UserError(f"{path} does not exist; give a run directory, a GGUF file or an ONNX folder")
    if (path / "manifest.json").is_file():
        return _inspect_run(path)
    exporter = exporter_of(path)
    return Inspection(exporter.name, exporter.inspect(path))


def _inspect_run(path: Path) -> Inspection:
    from signround_edge.run_directory import RunDirectory
    from signround_edge.schemes.plan import entry_bytes

    run = RunDirectory.open(path)
    target = run.manifest.targets[0]
    tensors = [
        TensorInfo(t.name, t.format or _float_name(t, entry_bytes(t, target)), tuple(t.shape), entry_bytes(t, target))
        for t in run.manifest.tensors
    ]
    manifest = run.manifest
    return Inspection("run", tensors, manifest.scheme, manifest.source_line, _calibration(manifest.settings))


def _float_name(entry: TensorEntry, stored: int) -> str:
    """The dtype of a tensor in floats in the target file, which holds most of them in 32 bits whatever the source."""
    return "float32" if stored == 4 * math.prod(entry.shape) else entry.dtype


def _calibration(settings: dict[str, Any]) -> dict[str, int | None] | None:
    if "calibration_bos" not in settings:
        return None
    return {"seqlen": settings["seqlen"], "bos": settings["calibration_bos"]}
