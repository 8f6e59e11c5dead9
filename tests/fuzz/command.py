"""One command of signround-edge in a forked process: exit code, output, time and peak memory of it and its children.

The process that forks has everything imported already, so a command costs milliseconds instead of seconds; what runs in
the child is the same `main`, with its own exit, its own stdout and stderr and a memory limit.
"""

from __future__ import annotations

import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

MEMORY_LIMIT = 4 << 30  # address space that a command may take beyond what the forking process has


@dataclass(frozen=True)
class Outcome:
    """What a command did.

    Attributes:
        code: exit code; negative: ended by that signal; None: ended by us, after the time limit.
        seconds: elapsed.
        peak_mb: largest resident set of the command or of one of its children, in MB (10^6 bytes).
        left: whether a process of its own was still running when it had ended.
    """

    code: int | None
    stdout: str
    stderr: str
    seconds: float
    peak_mb: float = 0.0
    left: bool = False


def run_forked(arguments: Sequence[str], limit_s: float) -> Outcome:
    """Run `signround-edge <arguments>` in a fork of this process."""
    sys.stdout.flush()
    sys.stderr.flush()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        began = time.monotonic()
        pid = os.fork()
        if pid == 0:
            _child(arguments, out.fileno(), err.fileno())
        descriptor = os.pidfd_open(pid)
        ended = bool(select.select([descriptor], [], [], limit_s)[0])
        os.close(descriptor)
        if not ended:
            os.killpg(pid, signal.SIGKILL)
        _, status, usage = os.wait4(pid, 0)
        seconds = time.monotonic() - began
        code = os.waitstatus_to_exitcode(status) if ended else None
        return Outcome(code, _text(out), _text(err), seconds, usage.ru_maxrss * 1024 / 1e6, _end_group(pid))


def run_really(arguments: Sequence[str], limit_s: float) -> Outcome:
    """The same by a new interpreter, as a user starts it."""
    began = time.monotonic()
    command = [sys.executable, "-m", "signround_edge.cli", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False)
    except subprocess.TimeoutExpired:
        return Outcome(None, "", "", limit_s)
    return Outcome(done.returncode, done.stdout, done.stderr, time.monotonic() - began)


def _child(arguments: Sequence[str], out: int, err: int) -> None:
    """Never returns."""
    code = 1
    try:
        os.setsid()
        os.dup2(out, 1)
        os.dup2(err, 2)
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY_LIMIT, size + MEMORY_LIMIT))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        from signround_edge.cli import main

        main(list(arguments), prog_name="signround-edge")
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # the tests' own process is not to be cleaned up twice


def _end_group(group: int) -> bool:
    """End what is left of a process group; whether there was anything."""
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def _text(file: BinaryIO) -> str:
    file.seek(0)
    return file.read().decode(errors="backslashreplace")
