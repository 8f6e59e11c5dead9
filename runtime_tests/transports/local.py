"""A worker process on this machine, in this Python."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from runtime_tests.transports.interface import DEFAULT_TIMEOUT, WorkerFailure
from runtime_tests.transports.process import ProcessWorker

__all__ = ["DEFAULT_TIMEOUT", "LocalTransport", "LocalWorker", "WorkerFailure"]

# One thread: figures do not vary, and no debugger is attached to a crash.
QUIET_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "GGML_NO_BACKTRACE": "1"}


class LocalWorker(ProcessWorker):
    """`python -m runtime_tests.worker` as a child process.

    Args:
        subject: what the worker works on; it starts every error sentence.
        timeout: seconds a request may take; then the process is killed.
    """

    def __init__(self, subject: str, timeout: float = DEFAULT_TIMEOUT) -> None:
        # -P: a file called numpy.py in the current folder must not become part of the worker
        super().__init__(subject, [sys.executable, "-P", "-m", "runtime_tests.worker"], timeout, _environment())


@dataclass(frozen=True)
class LocalTransport:
    """This machine."""

    def unavailable(self) -> str | None:
        """Never: what a runtime needs besides, it says itself."""
        return None

    def start(self, subject: str, timeout: float = DEFAULT_TIMEOUT) -> LocalWorker:
        """See `Transport`."""
        return LocalWorker(subject, timeout)

    def close(self) -> None:
        """Nothing is shared between workers."""


def _environment() -> dict[str, str]:
    """Our packages are found wherever the client found them."""
    here = str(Path(__file__).resolve().parents[2])
    path = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": here + (os.pathsep + path if path else ""), **QUIET_ENVIRONMENT}
