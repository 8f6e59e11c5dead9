"""Keeping transformers' own lines out of ours: what matters of a model is checked here, and said in our words."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator


@contextlib.contextmanager
def transformers_quiet() -> Iterator[None]:
    """Within, transformers shows no progress bar, no report of what it loads, and no warning about a config.

    Of a config it warns where two entries do not fit together (the factor of yarn, beside the lengths that it follows
    from); it computes with one of them all the same, and that is what is tuned and compared with.
    """
    from transformers.utils import logging as their_logging

    shown = their_logging.is_progress_bar_enabled()
    level = their_logging.get_verbosity()
    their_logging.disable_progress_bar()
    their_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        their_logging.set_verbosity(level)
        if shown:
            their_logging.enable_progress_bar()
