"""Requests that survive a lost connection: a new worker is started, and the request repeated."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any, TypeVar

from numpy.typing import NDArray

from runtime_tests.transports.interface import Closing, ConnectionLost, Worker
from runtime_tests.worker.protocol import Message
from signround_edge.errors import UserError

_T = TypeVar("_T")
_TRIES = 5  # connections that may break in the middle of one request
_FIRST_WAIT = 0.5  # seconds before the second try; doubled each time


class ReconnectingWorker(Closing):
    """A worker that is started at the first request, and anew when its connection breaks.

    Use as a context manager, or call `close`; nothing is left running after either.

    Args:
        subject: what it works on; it starts the sentence that it is closed.
        start: gives a worker that is ready for requests; what it needs from earlier ones is done here again.

    Attributes:
        reconnections: how often the connection was made anew.
    """

    def __init__(self, subject: str, start: Callable[[], Worker]) -> None:
        self._subject, self._start = subject, start
        self._worker: Worker | None = None
        self._closed = False
        self.reconnections = 0

    def call(self, op: str, arrays: dict[str, NDArray[Any]] | None = None, **header: Any) -> Message:
        """See `Worker`; ConnectionLost only when no connection holds."""
        return self._patiently(lambda: self._started().call(op, arrays, **header))

    def close(self) -> None:
        """End the worker. May be repeated."""
        self._closed = True
        self._let_go()

    def _started(self) -> Worker:
        if self._closed:
            raise UserError(f"{self._subject}: the session is closed")
        if self._worker is None:
            self._worker = self._start()
        return self._worker

    def _let_go(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.close()

    def _patiently(self, act: Callable[[], _T]) -> _T:
        """`act()`, tried again after a pause when the connection breaks."""
        for attempt in range(_TRIES):
            try:
                return act()
            except ConnectionLost:
                with contextlib.suppress(UserError):
                    self._let_go()
                if attempt == _TRIES - 1:
                    raise
                self.reconnections += 1
                time.sleep(_FIRST_WAIT * 2**attempt)
        raise AssertionError("unreachable")
