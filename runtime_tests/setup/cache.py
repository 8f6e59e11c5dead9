"""Where downloads and built packages are kept: `$SIGNROUND_EDGE_CACHE`, or `~/.cache/signround-edge`.

Every entry is a folder that appears whole: it is filled under another name and renamed when it is complete, so that an
interrupted download leaves nothing that looks ready.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

VARIABLE = "SIGNROUND_EDGE_CACHE"


def cache_folder() -> Path:
    """The cache; it need not exist yet."""
    chosen = os.environ.get(VARIABLE)
    if chosen:
        return Path(chosen).absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "signround-edge"


def fill(folder: Path, make: Callable[[Path], None]) -> Path:
    """`folder`, filled by `make(temporary folder)` if it is not there yet; nothing is left when `make` fails."""
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        temporary.chmod(0o755)
        make(temporary)
        if folder.is_dir():  # another process was faster
            return folder
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder
