"""What a transport and a worker are: how `verify` reaches whatever computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, Self

from numpy.typing import NDArray

from runtime_tests.worker.protocol import Message
from signround_edge.errors import UserError

DEFAULT_TIMEOUT = 900.0  # seconds a request may take before the worker counts as hung


class WorkerFailure(UserError):
    """The worker crashed, hung or answered garbage; the sentence says which, with its last lines."""


class ConnectionLost(WorkerFailure):
    """The way to the worker broke, which says nothing about the artifact: worth another try."""


class Closing:
    """What is closed at the end of a `with` block, or by `close`."""

    def close(self) -> None:
        """Free what it holds. May be repeated."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Worker(Protocol):
    """Something that answers requests, one at a time. Use as a context manager, or call `close`."""

    def call(self, op: str, arrays: dict[str, NDArray[Any]] | None = None, **header: Any) -> Message:
        """Send one request and wait for its reply.

        Raises:
            ConnectionLost: the connection broke; the worker is gone, a new one may do better.
            WorkerFailure: a crash, a hang, or garbage; the worker is gone.
            UserError: the worker's own sentence about its input.
        """
        ...

    def push(self, artifact: Path) -> str:
        """Bring an artifact to where the worker is, unless it is there already; what to call it in requests."""
        ...

    def close(self) -> None:
        """End the worker and free what it held. May be repeated."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


class Transport(Protocol):
    """A way to have workers on one device."""

    def unavailable(self) -> str | None:
        """Why no worker can be had, in one clause with the way out; None when one can."""
        ...

    def close(self) -> None:
        """Free what workers share. May be repeated."""
        ...

    def start(self, subject: str, timeout: float) -> Worker:
        """A new worker.

        Args:
            subject: what it will work on; it starts every error sentence.
            timeout: seconds a request may take; then the worker is ended.
        """
        ...
