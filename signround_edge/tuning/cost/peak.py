"""What a run has cost so far: time, CPU time and the most memory, as the operating system and the GPU's driver say."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass, field

import psutil
import torch

from signround_edge.progress import duration, size


@dataclass(frozen=True)
class Spent:
    """What a process has used.

    Attributes:
        seconds, cpu_seconds: since it was begun.
        peak_bytes: the largest resident set of the process.
        peak_gpu_bytes: the most that torch has had allocated; None without a GPU.
    """

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    peak_gpu_bytes: int | None

    def __str__(self) -> str:
        gpu = "" if self.peak_gpu_bytes is None else f", {size(self.peak_gpu_bytes)} of the GPU's"
        return f"{duration(self.seconds)}; at most {size(self.peak_bytes)} of memory{gpu}"


@dataclass(frozen=True)
class Meter:
    """Runs from its making on."""

    device: torch.device
    began: float = field(default_factory=time.monotonic)
    cpu_began: float = field(default_factory=time.process_time)

    def read(self) -> Spent:
        """Until now."""
        gpu = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None
        return Spent(time.monotonic() - self.began, time.process_time() - self.cpu_began, peak_resident(), gpu)


def current_resident() -> int:
    """Bytes of the resident set of this process now."""
    return int(psutil.Process().memory_info().rss)


def free_memory() -> int:
    """Memory of the host that can be had without swapping, in bytes."""
    return int(psutil.virtual_memory().available)


def peak_resident() -> int:
    """Bytes of the largest resident set that this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
