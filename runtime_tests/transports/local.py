"""A worker process on this machine, reached through its stdin and stdout."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any, BinaryIO, cast

from numpy.typing import NDArray

from runtime_tests.transports.protocol import Message, ProtocolError, receive, send
from signround_edge.errors import UserError

DEFAULT_TIMEOUT = 900.0  # seconds a request may take before the worker counts as hung
_SECONDS_TO_LEAVE = 2.0
_LAST_LINES = 4


class WorkerFailure(UserError):
    """The worker crashed, hung or answered garbage; the sentence says which, with its last lines."""


class LocalWorker:
    """`python -m runtime_tests.worker` as a child process, one request at a time. Use as a context manager.

    Args:
        subject: what the worker works on; it starts every error sentence.
        timeout: seconds a request may take; then the process is killed.
    """

    def __init__(self, subject: str, timeout: float = DEFAULT_TIMEOUT) -> None:
        self._subject = subject
        self._timeout = timeout
        self._hung = False
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  closed in close()
        self._process = subprocess.Popen(
            # -P: a file called numpy.py in the current folder must not become part of the worker
            [sys.executable, "-P", "-m", "runtime_tests.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            pipesize=1 << 20,  # megabytes of logits, not lines of text
            env=_environment(),
        )

    @property
    def pid(self) -> int:
        """Process id of the worker."""
        return self._process.pid

    def call(self, op: str, arrays: dict[str, NDArray[Any]] | None = None, **header: Any) -> Message:
        """Send one request and wait for its reply.

        Raises:
            WorkerFailure: a crash, a hang, or garbage; the process is gone then.
            UserError: the worker's own sentence about its input.
        """
        watchdog = threading.Timer(self._timeout, self._kill_hung)
        watchdog.daemon = True
        watchdog.start()
        try:
            send(cast(BinaryIO, self._process.stdin), Message({"op": op, **header}, arrays or {}))
            reply = receive(cast(BinaryIO, self._process.stdout))
        except (ProtocolError, OSError, ValueError) as error:
            raise self._failure(op, str(error)) from error
        finally:
            watchdog.cancel()
        if reply is None:
            raise self._failure(op, "it ended without an answer")
        if "error" in reply.header:
            raise UserError(str(reply.header["error"]))
        return reply

    def close(self) -> None:
        """End the process (its stdin ends; killed when it does not leave) and free what it held. May be repeated."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):  # unsent bytes to a process that is gone
                    stream.close()
        try:
            self._process.wait(_SECONDS_TO_LEAVE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._stderr.close()

    def __enter__(self) -> LocalWorker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _kill_hung(self) -> None:
        self._hung = True
        self._process.kill()

    def _failure(self, op: str, detail: str) -> WorkerFailure:
        """Why the worker failed; it has ended, or is ended here."""
        try:
            code = self._process.wait(_SECONDS_TO_LEAVE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            code = 0
        if self._hung:
            what = f"gave no answer to {op!r} within {self._timeout:g} s and was ended"
        elif code < 0:
            what = f"was ended by {signal.Signals(-code).name} in {op!r}"
        else:
            what = f"failed in {op!r} ({detail})"
        lines = self._last_lines()
        self.close()
        return WorkerFailure(f"{self._subject}: the runtime {what}" + (f"; its last lines: {lines}" if lines else ""))

    def _last_lines(self) -> str:
        self._stderr.seek(0, os.SEEK_END)
        self._stderr.seek(max(0, self._stderr.tell() - 4000))
        lines = self._stderr.read().decode(errors="replace").splitlines()
        return " | ".join([line.strip() for line in lines if line.strip()][-_LAST_LINES:])


def _environment() -> dict[str, str]:
    """One thread, no debugger attached to a crash, and our packages found wherever the client found them."""
    here = str(Path(__file__).resolve().parents[2])
    path = os.environ.get("PYTHONPATH")
    return {
        **os.environ,
        "PYTHONPATH": here + (os.pathsep + path if path else ""),
        "OMP_NUM_THREADS": "1",
        "GGML_NO_BACKTRACE": "1",
    }
