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


SILENT = Progress(lambda text: None)
