"""Keeping libraries that configure logging when they are imported from doing so for the whole process."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator


@contextlib.contextmanager
def logging_restored(chatty: str) -> Iterator[None]:
    """Within, the logger named `chatty` says warnings only; afterwards it and the root logger are as they were."""
    root, quiet = logging.getLogger(), logging.getLogger(chatty)
    handlers, level, before = list(root.handlers), root.level, quiet.level
    quiet.setLevel(logging.WARNING)
    try:
        yield
    finally:
        quiet.setLevel(before)
        root.handlers[:] = handlers
        root.setLevel(level)
