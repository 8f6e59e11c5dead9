"""The processor in words, for tables."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path


def processor(detail: str = "") -> str:
    """Its name, what else is to be said of it, and how many cores of it there are for us."""
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.is_file() else []
    return f"{names[0] if names else platform.machine()}{detail}, {len(os.sched_getaffinity(0))} cores"
