"""Running a command and measuring it as the operating system accounts for it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
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


# A child's peak counts what its parent held when it forked, so a small process in between starts and measures it.
_LAUNCHER = """
import os, sys
pid = os.posix_spawnp(sys.argv[2], sys.argv[2:], os.environ)
_, status, usage = os.wait4(pid, 0)
with open(sys.argv[1], "w") as out:
    print(usage.ru_utime + usage.ru_stime, usage.ru_maxrss, file=out)
sys.exit(os.waitstatus_to_exitcode(status) & 255)
"""


def run_measured(command: list[str], log: Path, environment: dict[str, str] | None = None) -> Cost:
    """Run a command with its output in `log`; CalledProcessError when it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary, log.open("wb") as out:
        report = Path(temporary) / "usage.txt"
        launcher = [sys.executable, "-S", "-E", "-c", _LAUNCHER, str(report)]
        variables = {**os.environ, **(environment or {})}
        began = time.monotonic()
        done = subprocess.run([*launcher, *command], stdout=out, stderr=out, env=variables, check=False)
        wall = time.monotonic() - began
        if done.returncode != 0:
            said = log.read_text(errors="replace")[-2000:]
            raise subprocess.CalledProcessError(done.returncode, command, output=said)
        cpu, peak_kb = map(float, report.read_text().split())
    return Cost(wall, cpu, peak_kb * 1024 / 1e6)
