"""One writer of a run at a time, whatever ends it.

The lock is the operating system's on a file in the run directory: it goes with its process, so that SIGKILL leaves a
file that holds nobody up. The file says which process has it, and is removed when that ends by itself. Where there is
no such lock (Windows, some network file systems) nothing is refused.
"""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterator
from pathlib import Path

from signround_edge.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = "quantize.lock"


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Be the only process that writes the run directory `out`; folders that are made for it go if they stay empty.

    Raises:
        UserError: another process is at it.
    """
    if fcntl is None or (out.exists() and not out.is_dir()):
        yield
        return
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    out.mkdir(parents=True, exist_ok=True)
    handle = None
    try:
        handle = _take(out / LOCK_FILE)
        yield
    finally:
        if handle is not None:
            (out / LOCK_FILE).unlink(
                missing_ok=True
            )  # before the lock goes: whoever waits for the name makes a new one
            os.close(handle)
        with contextlib.suppress(OSError):  # the run is in it
            for folder in made:
                folder.rmdir()


def _take(file: Path) -> int | None:
    """The locked file; None where files cannot be locked, or nothing can be written (then no run can be, either)."""
    while True:
        try:
            handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError:
            return None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(handle, 200, 0).decode(errors="replace").strip() or "another process"
            os.close(handle)
            raise UserError(
                f"{file.parent} is being written by {holder}; wait until it ends, or give another -o"
            ) from error
        except OSError:
            os.close(handle)
            return None
        if _is_still(file, handle):
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"process {os.getpid()} on {platform.node()}\n".encode(), 0)
            return handle
        os.close(handle)  # its last holder has removed it meanwhile


def _is_still(file: Path, handle: int) -> bool:
    """Whether a name is that of an open file."""
    try:
        return os.path.samestat(os.stat(file), os.fstat(handle))
    except FileNotFoundError:
        return False
