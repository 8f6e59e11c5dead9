"""A folder that appears whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from signround_edge.errors import UserError

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def whole_folder(out: Path, what: str, marker: str | None = None) -> Iterator[Path]:
    """Give `<out>.partial` to write in; it becomes `out` when the block ends well, and is removed when it does not.

    An earlier output at `out` is replaced only then; a partial folder of a killed process is removed first.

    Args:
        what: is written, for the message: "the ONNX export".
        marker: name of a file that tells an earlier output of ours, which may be replaced; None: nothing may.
    Raises:
        UserError: `out` is a file or holds something else, or the disk is full.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; give -o a folder for {what}")
    if out.is_dir() and any(out.iterdir()) and not (marker and (out / marker).is_file()):
        raise UserError(f"{out} is a folder with other files in it; give -o a new or empty folder")
    partial = out.with_name(out.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        _flush(partial)
        _swap(partial, out)
    except Exception as error:
        if _is_disk_full(error):
            raise UserError(f"{out}: the disk is full; nothing was kept, free some space and try again") from error
        if isinstance(error, OSError):
            raise UserError(f"{out} cannot be written ({error.strerror or error}); choose another folder") from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _swap(partial: Path, out: Path) -> None:
    previous = out.with_name(out.name + ".previous")
    shutil.rmtree(previous, ignore_errors=True)
    if out.exists():
        os.replace(out, previous)
    os.replace(partial, out)
    shutil.rmtree(previous, ignore_errors=True)


def _flush(folder: Path) -> None:
    for file in folder.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())


def _is_disk_full(error: BaseException | None) -> bool:
    """Also through libraries that wrap the error (safetensors has an error type of its own)."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _DISK_FULL:
            return True
        if "No space left on device" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def write_atomically(path: Path, data: bytes) -> None:
    """Write under a temporary name, flush to disk, rename: readers see the old file or the whole new one."""
    write_together({path: data})


def write_together(files: Mapping[Path, bytes]) -> None:
    """Write files that speak of each other: all of them are whole on the disk before the first is renamed."""
    temporary = {path.with_name(path.name + ".partial"): path for path in files}
    try:
        for partial, path in temporary.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as out:
                out.write(files[path])
                out.flush()
                os.fsync(out.fileno())
    except BaseException:
        for partial in temporary:
            partial.unlink(missing_ok=True)
        raise
    for partial, path in temporary.items():
        os.replace(partial, path)


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
