"""Requests that survive a lost connection: a new worker is started, and the request repeated."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any, Self, TypeVar

from numpy.typing import NDArray

from runtime_tests.transports.interface import ConnectionLost, Transport, Worker
from runtime_tests.transports.protocol import Message
from signround_edge.errors import UserError

_T = TypeVar("_T")
_TRIES = 5  # connections that may break in the middle of one request
_FIRST_WAIT = 0.5  # seconds before the second try; doubled each time


def patiently(act: Callable[[], _T], lost: Callable[[], None]) -> _T:
    """`act()`, tried again after `lost()` and a pause when the connection breaks; ConnectionLost after the fifth."""
    for attempt in range(_TRIES):
        try:
            return act()
        except ConnectionLost:
            with contextlib.suppress(UserError):
                lost()
            if attempt == _TRIES - 1:
                raise
            time.sleep(_FIRST_WAIT * 2**attempt)
    raise AssertionError("unreachable")


class ReconnectingWorker:
    """A worker for requests that need nothing of the ones before them; see `Transport.start` for the arguments.

    Use as a context manager, or call `close`.
    """

    def __init__(self, transport: Transport, subject: str, timeout: float) -> None:
        self._start = lambda: transport.start(subject, timeout)
        self._worker: Worker | None = None

    def call(self, op: str, arrays: dict[str, NDArray[Any]] | None = None, **header: Any) -> Message:
        """See `Worker`; ConnectionLost only when no connection holds."""
        return patiently(lambda: self._started().call(op, arrays, **header), self.close)

    def close(self) -> None:
        """End the worker. May be repeated."""
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _started(self) -> Worker:
        if self._worker is None:
            self._worker = self._start()
        return self._worker
