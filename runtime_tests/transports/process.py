"""A worker behind the stdin and stdout of a process on this machine: the worker itself, or ssh, qemu or node."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

from numpy.typing import NDArray

from runtime_tests.transports.interface import Closing, ConnectionLost, WorkerFailure
from runtime_tests.worker.protocol import Message, ProtocolError, receive, send
from signround_edge.errors import UserError, last_lines

_SECONDS_TO_LEAVE = 2.0
_PIPE_BYTES = 1 << 20  # megabytes of logits, not lines of text


class ProcessWorker(Closing):
    """A child process that speaks the protocol, one request at a time. Use as a context manager.

    Args:
        subject: what the worker works on; it starts every error sentence.
        command: the process; its standard error collects in a file, whose last lines errors quote.
        timeout: seconds a request may take; then the process is killed.
        environment: of the process.
        lost_code: the exit code that means that the connection broke and not the worker (ssh: 255).
        pass_fds: file descriptors that the process inherits besides its three streams.
    """

    def __init__(
        self,
        subject: str,
        command: Sequence[str],
        timeout: float,
        environment: Mapping[str, str] | None = None,
        lost_code: int | None = None,
        pass_fds: Sequence[int] = (),
    ) -> None:
        self._subject = subject
        self._timeout = timeout
        self._lost_code = lost_code
        self._hung = False
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  closed in close()
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                pipesize=_PIPE_BYTES,
                env=environment,
                pass_fds=pass_fds,
            )
        except OSError as error:
            self._stderr.close()
            raise WorkerFailure(f"{subject}: {command[0]} cannot be started ({error.strerror})") from error

    @property
    def pid(self) -> int:
        """Process id of the worker."""
        return self._process.pid

    @property
    def streams(self) -> tuple[BinaryIO, BinaryIO]:
        """Where requests go and where replies come from."""
        return cast(BinaryIO, self._process.stdin), cast(BinaryIO, self._process.stdout)

    def push(self, artifact: Path) -> str:
        """The worker sees this machine's files."""
        return str(artifact.absolute())

    def call(self, op: str, arrays: dict[str, NDArray[Any]] | None = None, **header: Any) -> Message:
        """Send one request and wait for its reply; errors as in `Worker`."""
        requests, replies = self.streams
        with self.watched(op):
            send(requests, Message({"op": op, **header}, arrays or {}))
            reply = receive(replies)
            if reply is None:
                raise ProtocolError("it ended without an answer")
        if "error" in reply.header:
            raise UserError(str(reply.header["error"]))
        return reply

    @contextlib.contextmanager
    def watched(self, op: str) -> Any:
        """A stretch of talk with the process: when it takes too long or breaks, WorkerFailure."""
        watchdog = threading.Timer(self._timeout, self._kill_hung)
        watchdog.daemon = True
        watchdog.start()
        try:
            yield
        except (ProtocolError, OSError, ValueError) as error:
            raise self._failure(op, str(error)) from error
        finally:
            watchdog.cancel()

    def close(self) -> None:
        """End the process (its stdin ends; killed when it does not leave) and free what it held. May be repeated."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):  # unsent bytes to a process that is gone
                    stream.close()
        self._ended()
        self._stderr.close()

    def _kill_hung(self) -> None:
        self._hung = True
        self._process.kill()

    def _ended(self) -> int:
        """The exit code; a process that does not end by itself is killed, which is no exit code of its own."""
        try:
            return self._process.wait(_SECONDS_TO_LEAVE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            return 0

    def _failure(self, op: str, detail: str) -> WorkerFailure:
        """Why the worker failed; it has ended, or is ended here."""
        code = self._ended()
        lines = self._last_lines()
        self.close()
        quoted = f"; its last lines: {lines}" if lines else ""
        if not self._hung and code == self._lost_code:
            return ConnectionLost(f"{self._subject}: the connection was lost in {op!r}{quoted}")
        if self._hung:
            what = f"gave no answer to {op!r} within {self._timeout:g} s and was ended"
        elif (name := _signal_name(code)) is not None:
            memory = ", as the system does when memory runs out" if name == "SIGKILL" else ""
            what = f"was ended by {name} in {op!r}{memory}"
        else:
            what = f"failed in {op!r} ({detail})"
        return WorkerFailure(f"{self._subject}: the runtime {what}{quoted}")

    def _last_lines(self) -> str:
        self._stderr.seek(0, os.SEEK_END)
        self._stderr.seek(max(0, self._stderr.tell() - 4000))
        return last_lines(self._stderr.read().decode(errors="replace"))


def _signal_name(code: int) -> str | None:
    """The signal behind an exit code, as this system or a shell on the other side reports it."""
    number = -code if code < 0 else code - 128
    try:
        return signal.Signals(number).name if number > 0 else None
    except ValueError:
        return None
