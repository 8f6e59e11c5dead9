"""Progress on stderr: a bar with the time left on a terminal, plain lines otherwise."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator

from signround_edge.progress import Progress, duration


@contextlib.contextmanager
def terminal_progress(title: str) -> Iterator[Progress]:
    """A Progress that writes to stderr; stdout stays clean for results."""
    if sys.stderr.isatty():
        with _bar(title) as progress:
            yield progress
    else:
        yield Progress(_plain_line, _PlainParts().update)


@contextlib.contextmanager
def _bar(title: str) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Bar(
        *columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=Console(stderr=True)
    ) as bar:
        task = bar.add_task(title, total=None, visible=False)

        def parts(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, visible=True)

        yield Progress(lambda text: bar.console.print(text, highlight=False, markup=False), parts)


def _plain_line(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class _PlainParts:
    """Prints "3/31 done, about 12 min left" after each part, from the pace since the first call."""

    def __init__(self) -> None:
        self._start: tuple[float, int] | None = None

    def update(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self._start is None:
            self._start = (now, done)
            return
        began, first = self._start
        left = (now - began) / max(1, done - first) * (total - done)
        _plain_line(f"{done}/{total} done, {duration(left)} left")
