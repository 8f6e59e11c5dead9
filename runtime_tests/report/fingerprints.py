"""Hashes of everything that a verdict rests on: run directory, artifacts, text and reference model."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from exporters.gguf.container.splits import model_files
from signround_edge.files import sha256_of
from signround_edge.model.config import CONFIG_FILE
from signround_edge.run_directory import RunDirectory

Role = Literal["run", "artifact", "text", "reference", "binary"]
_REFERENCE_PATTERNS = ("*.safetensors", CONFIG_FILE)


@dataclass(frozen=True)
class Fingerprint:
    """One input of `verify`.

    Attributes:
        role: what it was.
        path: as it was given.
        base: the folder that `files` are relative to.
        files: relative name → (sha256, bytes).
        modified: relative name → time of the last change in ns, when it was hashed.
    """

    role: Role
    path: str
    base: Path
    files: dict[str, tuple[str, int]]
    modified: dict[str, int]

    @property
    def total_bytes(self) -> int:
        """Bytes of all files."""
        return sum(size for _, size in self.files.values())

    def what_changed(self) -> str | None:
        """Which file was changed or removed since it was hashed, in one sentence; by size and time, without hashing."""
        for name, (_, size) in self.files.items():
            file = self.base / name
            try:
                found = file.stat()
            except OSError:
                return f"{file} was removed while it was verified"
            if (found.st_size, found.st_mtime_ns) != (size, self.modified[name]):
                return f"{file} was changed while it was verified"
        return None

    def to_json(self, folder: Path) -> dict[str, Any]:
        """The entry of a certificate in `folder`; `relative_base` is from there, so that both may move together."""
        return {
            "role": self.role,
            "path": self.path,
            "base": str(self.base.absolute()),
            "relative_base": os.path.relpath(self.base, folder),
            "total_bytes": self.total_bytes,
            "files": {name: {"sha256": digest, "bytes": size} for name, (digest, size) in self.files.items()},
        }


def fingerprint(role: Role, path: Path) -> Fingerprint:
    """Hash a file, all files of a split model, or all files of a folder (of a reference: weights and config)."""
    if path.is_dir():
        patterns = _REFERENCE_PATTERNS if role == "reference" else ("**/*",)
        return _fingerprint(role, path, path, (f for pattern in patterns for f in path.glob(pattern)))
    return _fingerprint(role, path, path.parent, model_files(path))


def fingerprint_run(run: RunDirectory) -> Fingerprint:
    """Hash the manifest, the parts that it names and the config folder."""
    parts = [run.path / "blocks" / name for name in run.part_files()]
    return _fingerprint("run", run.path, run.path, [run.path / "manifest.json", *parts, *run.config_dir.rglob("*")])


def _fingerprint(role: Role, path: Path, base: Path, files: Iterable[Path]) -> Fingerprint:
    found = sorted({file for file in files if file.is_file()})
    names = {file.relative_to(base).as_posix(): file for file in found}
    before = {name: file.stat() for name, file in names.items()}
    hashes = {name: (sha256_of(file), before[name].st_size) for name, file in names.items()}
    return Fingerprint(role, str(path), base, hashes, {name: stat.st_mtime_ns for name, stat in before.items()})
