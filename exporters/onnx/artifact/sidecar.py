"""`signround_edge.json`: where an exported folder comes from, which tensor holds which parameter, and file hashes."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exporters.onnx.bindings import Binding
from signround_edge.errors import UserError
from signround_edge.files import sha256_of

SIDECAR = "signround_edge.json"
_FORMAT = "onnx"


@dataclass(frozen=True)
class Sidecar:
    """The contents of `signround_edge.json`.

    Attributes:
        provenance: version, scheme, manifest_sha256, source_check, graph_builder.
        dtype: None for packed integers, "f32" or "f16" for a control graph.
        accuracy_level: of every MatMulNBits.
        bindings: every stored tensor.
        zero_biases: parameters that the graph leaves out because all their values are zero.
        files: file name → sha256, for every other file of the folder.
        kv_cache: the graph has a key-value cache; without one it wants all tokens again for each new one.
        scale_dtype: "f32" or "f16", how the scales of packed integers are stored.
        operators: which hold packed integers, "matmulnbits" or "qdq" (see `OnnxOptions`).
        io_dtype: what the graph was asked to compute in, "f32" or "f16" (see `OnnxOptions`).
        level_4_cost: what accuracy level 4 costs on this model (`LevelCost`), where that was measured.
    """

    provenance: dict[str, str]
    dtype: str | None
    accuracy_level: int
    bindings: list[Binding]
    zero_biases: list[str]
    files: dict[str, str] = field(default_factory=dict)
    kv_cache: bool = True
    scale_dtype: str = "f32"
    level_4_cost: dict[str, Any] | None = None
    operators: str = "matmulnbits"
    io_dtype: str = "f32"

    def to_bytes(self) -> bytes:
        """The file."""
        data = {
            "format": _FORMAT,
            **self.provenance,
            "dtype": self.dtype,
            "accuracy_level": self.accuracy_level,
            "kv_cache": self.kv_cache,
            "scale_dtype": self.scale_dtype,
            "operators": self.operators,
            "io_dtype": self.io_dtype,
            "level_4_cost": self.level_4_cost,
            "files": self.files,
            "zero_biases": self.zero_biases,
            "tensors": [b.to_json() for b in self.bindings],
        }
        return (json.dumps(data, indent=1) + "\n").encode()

    @classmethod
    def read(cls, folder: Path) -> Sidecar:
        """UserError when the folder has none, or it is not readable."""
        file = folder / SIDECAR
        if not file.is_file():
            raise UserError(f"{folder} has no {SIDECAR}, so it is no export of signround-edge; export the run again")
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
            facts = ("version", "scheme", "manifest_sha256", "source_check", "graph_builder")
            provenance = {k: data[k] for k in facts if k in data}
            bindings = [Binding.from_json(t) for t in data["tensors"]]
            return cls(
                provenance,
                data["dtype"],
                data["accuracy_level"],
                bindings,
                data["zero_biases"],
                dict(data["files"]),
                data.get("kv_cache", True),
                data.get("scale_dtype", "f32"),
                data.get("level_4_cost"),
                data.get("operators", "matmulnbits"),
                data.get("io_dtype", "f32"),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{file} is not readable ({type(error).__name__}); export the run again") from error


def hash_files(folder: Path) -> dict[str, str]:
    """Path in the folder → sha256 of every file in it but the sidecar."""
    files = sorted(f for f in folder.rglob("*") if f.is_file() and f != folder / SIDECAR)
    return {f.relative_to(folder).as_posix(): sha256_of(f) for f in files}
