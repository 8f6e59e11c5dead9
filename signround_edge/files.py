"""Files and folders that appear whole or not at all, and what an error says of the disk."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from signround_edge.errors import UserError

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_DISK_TROUBLE = (*_DISK_FULL, errno.EFBIG, errno.EROFS)
_WITHIN = ".partial"
_SHORT_WRITE = re.compile(r"\d+ requested and \d+ written")  # what numpy says, without an error number


@contextlib.contextmanager
def whole_files(*paths: Path) -> Iterator[list[Path]]:
    """Give `<path>.partial` of each path to write; they take the paths' names when the block ends well.

    They are on the disk then. Otherwise none is left, and what was at `paths` stays. Missing folders are made.
    """
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
    partials = [_partial_of(path) for path in paths]
    try:
        yield partials
        for partial in partials:
            _flush(partial)
        for partial, path in zip(partials, paths, strict=True):
            os.replace(partial, path)
    except BaseException:
        for partial in partials:
            partial.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """`whole_files` for one file."""
    with whole_files(path) as (partial,):
        yield partial


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file; readers see the old one or the whole new one."""
    with whole_file(path) as partial:
        partial.write_bytes(data)


@contextlib.contextmanager
def whole_folder(out: Path, what: str, marker: str | None = None) -> Iterator[Path]:
    """Give a partial folder to write in; it becomes `out` when the block ends well, and is removed when it does not.

    It is `<out>.partial`, and takes the name at one moment. A folder that is there and empty, or that this process
    works in, is filled instead: it may be a mount, or what a shell stands in. The partial folder is within it then, and
    files move out of it one by one, the marker last.

    An earlier output at `out` is replaced only then; a partial folder of a killed process is removed first.

    Args:
        what: is written, for the message: "the ONNX export".
        marker: name of a file that tells an earlier output of ours, which may be replaced; None: nothing may.
    Raises:
        UserError: `out` is a file, holds something else, or the disk is full.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; give -o a folder for {what}")
    real = out.resolve()
    there = _entries(real) if real.is_dir() else []
    if there and not (marker and (real / marker).is_file()):
        raise UserError(f"{out} is a folder with other files in it; give -o a new or empty folder")
    fills = real.is_dir() and (not there or Path.cwd().is_relative_to(real))
    partial = real / _WITHIN if fills else _partial_of(real)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                _flush(file)
        if fills:
            _fill(real, partial, marker)
        else:
            _swap(partial, real)
    except Exception as error:
        if is_disk_full(error):
            raise UserError(f"{out}: the disk is full; nothing was kept, free some space and try again") from error
        if isinstance(error, OSError):
            raise UserError(f"{out} cannot be written ({error.strerror or error}); choose another folder") from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _entries(folder: Path) -> list[Path]:
    """What is in a folder, but for a partial folder that a killed process left."""
    return [path for path in folder.iterdir() if path.name != _WITHIN]


def _fill(folder: Path, partial: Path, marker: str | None) -> None:
    """Move what is in `partial`, a folder within `folder`, up into it in the place of what is there; all or nothing."""
    new = sorted(partial.iterdir(), key=lambda path: path.name == marker)
    old = sorted(_entries(folder), key=lambda path: path.name != marker)  # without its marker it is no output of ours
    kept = partial / _WITHIN
    kept.mkdir()
    moves = [(path, kept / path.name) for path in old] + [(path, folder / path.name) for path in new]
    done: list[tuple[Path, Path]] = []
    try:
        for source, target in moves:
            os.replace(source, target)
            done.append((source, target))
    except BaseException:
        for source, target in reversed(done):
            os.replace(target, source)
        raise


def _swap(partial: Path, out: Path) -> None:
    previous = out.with_name(out.name + ".previous")
    shutil.rmtree(previous, ignore_errors=True)
    if out.exists():
        os.replace(out, previous)
    os.replace(partial, out)
    shutil.rmtree(previous, ignore_errors=True)


def _partial_of(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def _flush(file: Path) -> None:
    with file.open("rb") as handle:
        os.fsync(handle.fileno())


def is_disk_full(error: BaseException) -> bool:
    """Whether an error, or what caused it, says that there is no space left."""
    return _is_about(error, _DISK_FULL)


def is_disk_trouble(error: BaseException) -> bool:
    """Whether an error, or what caused it, is about space or the disk itself and not about a file's content."""
    return _is_about(error, _DISK_TROUBLE)


def _is_about(error: BaseException, numbers: tuple[int, ...]) -> bool:
    """Also through libraries that wrap the system's error (safetensors has an error type of its own)."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, OSError) and found.errno in numbers:
            return True
        if "No space left on device" in str(found) or _SHORT_WRITE.search(str(found)):
            return True
        found = found.__cause__ or found.__context__
    return False


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
