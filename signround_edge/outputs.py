"""Where a command may write: into nothing that it reads, and below folders only."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from signround_edge.errors import UserError

_BESIDE = ("", ".partial", ".previous")  # the names that `files` writes under, too


def check_output(flag: str, out: Path, inputs: Mapping[str, Path | None]) -> None:
    """UserError where writing `out` would touch what the command reads, or could not be.

    Args:
        flag: that `out` was given by.
        inputs: flag or argument → a file, or a folder in which nothing may be written; what is not there counts not.
    """
    place = next((folder for folder in out.parents if folder.exists()), None)
    if place is not None and not place.is_dir():
        raise UserError(
            f"{flag} {out} was not written: {place} is a file and no folder; give a folder, or another {flag}"
        )
    for name, path in inputs.items():
        if path is None or not path.exists():
            continue
        touched = [out.with_name(out.name + suffix) for suffix in _BESIDE] if out.name else [out]
        if path.is_dir() and any(_is_in(one, path) for one in touched):
            raise UserError(f"{flag} {out} lies in {path}, which this command reads; give a {flag} outside of it")
        if any(_is_same(one, path) for one in touched):
            raise UserError(f"{name} and {flag} are the same file ({path}); give {flag} another name")


def lies_in(path: Path | None, folder: Path) -> bool:
    """Whether a file or folder is a folder, or in it, whatever links lead there."""
    return path is not None and path.exists() and _is_in(path, folder)


def _is_in(path: Path, folder: Path) -> bool:
    whole = path.resolve()
    return any(_is_same(one, folder) for one in (whole, *whole.parents))


def _is_same(one: Path, other: Path) -> bool:
    return one.exists() and other.exists() and os.path.samefile(one, other)
