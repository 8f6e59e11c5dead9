"""How long work takes on a device, and how much memory it takes at most."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

_SAMPLED_EVERY_S = 0.02


class Moment:
    """Now, in the order of the device's work: a CUDA event, which holds nothing up, or the clock on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._event: torch.cuda.Event | None = None
        self._clock = 0.0
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record()
        else:
            self._clock = time.perf_counter()

    def until(self, later: Moment) -> float:
        """Seconds from this moment to a later one; waits for the device to come to it."""
        if self._event is None or later._event is None:
            return later._clock - self._clock
        later._event.synchronize()
        return float(self._event.elapsed_time(later._event)) / 1e3


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that some work takes once, the device idle before."""
    synchronize(device)
    began = Moment(device)
    work()
    return began.until(Moment(device))


def median_seconds(work: Callable[[], object], device: torch.device, repeats: int = 10, inner: int = 1) -> float:
    """Median seconds of some work over repeats of `inner` calls each, after two that are not counted."""

    def several() -> None:
        for _ in range(inner):
            work()

    for _ in range(2):
        several()
    return median(timed(several, device) for _ in range(repeats)) / inner


class Sections:
    """Seconds of the sections of a loop's body; the device is idle between them, so each has its host time, too."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: dict[str, list[float]] = {}

    @contextlib.contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Time what is within."""
        synchronize(self._device)
        began = Moment(self._device)
        yield
        self._seconds.setdefault(name, []).append(began.until(Moment(self._device)))

    def first(self, name: str) -> float:
        """Seconds of the first time, in which kernels are compiled."""
        return self._seconds[name][0]

    def median(self, name: str) -> float:
        """Median seconds without the first time."""
        return median(self._seconds[name][1:])


class StepClock(Iterator[Tensor]):
    """A tuner's batches, with the moment at which each was asked for: the beginnings of its steps.

    Attributes:
        moments: one a step.
        start_peak: what `device_peak` was at the first step; the count begins anew there.
    """

    def __init__(self, batches: Iterator[Tensor], device: torch.device) -> None:
        self._batches, self._device = batches, device
        self.moments: list[Moment] = []
        self.start_peak: float | None = None

    def __next__(self) -> Tensor:
        if not self.moments:
            self.start_peak = device_peak(self._device)
            if self._device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self._device)
        self.moments.append(Moment(self._device))
        return next(self._batches)


def device_peak(device: torch.device) -> float | None:
    """Most GB (10^9 bytes) allocated on a GPU since the count began; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None


@dataclass
class Peaks:
    """GB (10^9 bytes). Those of the device are None on a CPU.

    Attributes:
        device: most that was allocated.
        reserved: most that the allocator held.
        host: largest resident set of the process.
        host_before: resident set before.
    """

    device: float | None = None
    reserved: float | None = None
    host: float = 0.0
    host_before: float = 0.0


@contextlib.contextmanager
def peak_memory(device: torch.device) -> Iterator[Peaks]:
    """Watch memory within; the figures are complete when it ends."""
    free_memory(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    peaks, ended = Peaks(host_before=_resident()), threading.Event()

    def watch() -> None:
        while True:
            peaks.host = max(peaks.host, _resident())
            if ended.wait(_SAMPLED_EVERY_S):
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peaks
    finally:
        ended.set()
        watcher.join()
        peaks.device = device_peak(device)
        peaks.reserved = torch.cuda.max_memory_reserved(device) / 1e9 if device.type == "cuda" else None


def free_memory(device: torch.device) -> None:
    """Give back what nothing refers to."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _resident() -> float:
    """GB of this process that are in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e9
