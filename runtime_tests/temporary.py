"""Temporary folders of `verify` that do not pile up: one that a killed process has left is removed by the next run.

Each folder holds a lock file that its process keeps locked; the system lets go of the lock however the process ends.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

PREFIX = "signround-verify-"
_LOCK = ".lock"


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """An empty folder, removed at the end."""
    remove_abandoned()
    with tempfile.TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True) as name:
        folder = Path(name)
        with (folder / _LOCK).open("wb") as lock:
            _locked(lock.fileno())
            yield folder


def remove_abandoned(where: Path | None = None) -> None:
    """Remove our folders that nobody holds any more, in the system's place for temporary files or another one."""
    if fcntl is None:
        return
    for folder in (where or Path(tempfile.gettempdir())).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            if folder.is_symlink() or folder.stat().st_uid != os.getuid():
                continue
            # Without a lock file it is just being made, or removed.
            with (folder / _LOCK).open("rb") as lock:
                if _locked(lock.fileno()):
                    shutil.rmtree(folder, ignore_errors=True)


def _locked(descriptor: int) -> bool:
    """Take the lock; False when another process has it."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
