"""Processes as tests see them: what runs below one, whether it is gone, and a client that is killed."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

_REPOSITORY = Path(__file__).parents[2]


@contextlib.contextmanager
def killed_client(script: str) -> Iterator[subprocess.Popen[str]]:
    """Our code in a Python process of its own, which gets SIGKILL at the end of the block."""
    environment = {**os.environ, "PYTHONPATH": str(_REPOSITORY)}
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as client:
        try:
            yield client
        finally:
            client.kill()


@contextlib.contextmanager
def killed_client_of_worker(start: str) -> Iterator[int]:
    """A `killed_client` that has started a worker: its process id.

    Args:
        start: Python that leaves the worker in `worker`.
    """
    with killed_client(f"{start}\nimport time\nprint(worker.pid, flush=True)\ntime.sleep(60)\n") as client:
        assert client.stdout is not None
        yield int(client.stdout.readline())


def wait_until(holds: Callable[[], object], seconds: float = 30.0) -> None:
    """AssertionError when it does not hold in time."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def descendants(pid: int) -> list[int]:
    """Process ids below one, from /proc."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError, ValueError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if fields[0] != "Z":
                    parents.setdefault(int(fields[1]), []).append(int(entry.name))
    found: list[int] = []
    queue = [pid]
    while queue:
        below = parents.get(queue.pop(), [])
        found += below
        queue += below
    return found


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""
