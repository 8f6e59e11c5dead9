"""Keeping libraries that configure logging when they are imported from doing so for the whole process."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator


@contextlib.contextmanager
def logging_restored(chatty: str) -> Iterator[None]:
    """Within, the logger named `chatty` says warnings only; afterwards it and the root logger are as they were.

    By a filter, since a module that is imported within may set its logger's level.
    """
    root, quiet = logging.getLogger(), logging.getLogger(chatty)
    handlers, level, before = list(root.handlers), root.level, quiet.level
    quiet.addFilter(_warns)
    try:
        yield
    finally:
        quiet.removeFilter(_warns)
        quiet.setLevel(before)
        root.handlers[:] = handlers
        root.setLevel(level)


def _warns(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING
