"""Running a command and measuring it as the operating system accounts for it."""

from __future__ import annotations

import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Cost:
    """What a whole process cost.

    Attributes:
        wall_s: elapsed seconds.
        cpu_s: user and system seconds of the process and its children.
        peak_mb: largest resident set in MB (10^6 bytes).
    """

    wall_s: float
    cpu_s: float
    peak_mb: float


def run_measured(command: list[str], log: Path, environment: dict[str, str] | None = None) -> Cost:
    """Run a command with its output in `log`; CalledProcessError when it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env={**os.environ, **(environment or {})})
        _, status, usage = os.wait4(process.pid, 0)
    wall = time.monotonic() - began
    code = os.waitstatus_to_exitcode(status)
    process.returncode = code
    if code != 0:
        raise subprocess.CalledProcessError(code, command, output=log.read_text(errors="replace")[-2000:])
    return Cost(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e6)
