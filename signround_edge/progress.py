"""Progress of a long run, as callbacks; `terminal.progress` shows them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


def _ignore_parts(_done: int, _total: int) -> None:
    pass


@dataclass(frozen=True)
class Progress:
    """Callbacks of a long run; each may be a no-op.

    Attributes:
        line: one line of text.
        parts: (parts done, parts in all) after each part.
    """

    line: Callable[[str], None]
    parts: Callable[[int, int], None] = _ignore_parts


def size(count: float) -> str:
    """Of memory: "310 MB", "4.2 GB"."""
    if count < 1e6:
        return f"{count:.0f} bytes"
    return f"{count / 1e6:.0f} MB" if count < 1e9 else f"{count / 1e9:.1f} GB"


def duration(seconds: float) -> str:
    """In a unit in which it is a small number."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


SILENT = Progress(lambda text: None)
