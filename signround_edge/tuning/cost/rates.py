"""How fast this machine is at what tuning does, measured on small pieces within a second or two."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from signround_edge.formats import BlockScales, get_grid
from signround_edge.tuning.block.gptq import DAMPING, compensated
from signround_edge.tuning.block.sign_step import RoundingState, fused_step
from signround_edge.tuning.block.start import initial_scales
from signround_edge.tuning.cost.work import Work
from signround_edge.tuning.settings import TuningSettings

_SIZE = 1024
_ROWS = {"searched": 64, "stepped": 256, "compensated": 1024}
_COLUMNS = {"searched": 1024, "stepped": 1024, "compensated": 256}


@dataclass(frozen=True)
class Machine:
    """A device, and the dtype in which tuning multiplies there.

    Attributes:
        bus: bytes a second from the host's memory; None where activations need not be moved.
    """

    device: torch.device
    dtype: torch.dtype
    bus: float | None = None

    def seconds(self, work: Work) -> float:
        """How long the work takes, all of one piece after the other."""
        total = work.flops / self._flops(self.dtype) + work.flops_f32 / self._flops(torch.float32)
        for kind in ("searched", "stepped", "compensated"):
            for grid, weights in getattr(work, kind).items():
                total += weights * self._a_weight(kind, grid)
        return total + (0.0 if self.bus is None else work.bus_bytes / self.bus)

    @functools.cache  # noqa: B019 - a machine lives as long as the process
    def _flops(self, dtype: torch.dtype) -> float:
        """Floating-point operations a second of a product of two matrices."""
        size = _SIZE if self.device.type == "cpu" else 8 * _SIZE
        one, other = (torch.randn(size, size, device=self.device).to(dtype) for _ in range(2))
        return 2 * size**3 / self._least(lambda: one @ other)

    @functools.cache  # noqa: B019
    def _a_weight(self, kind: str, grid_name: str) -> float:
        """Seconds a weight of what is done to single weights."""
        grid, rows = get_grid(grid_name), _ROWS[kind] * (1 if self.device.type == "cpu" else 16)
        weight = torch.randn(rows, _COLUMNS[kind], device=self.device)
        importance = torch.ones(weight.shape[1], device=self.device)

        def search() -> BlockScales:
            return initial_scales(grid, weight, importance, "search")

        if kind == "searched":
            return self._least(search) / weight.numel() / self._threads
        scales = initial_scales(grid, weight, importance, "absmax")
        if kind == "stepped":
            state, settings = RoundingState.start(grid, weight, scales), TuningSettings()

            def step() -> None:
                fused_step(state, weight, torch.empty_like(weight), 0, settings, compiled=False)

            return self._least(step) / weight.numel() / self._threads
        hessian, fields = torch.eye(weight.shape[1], device=self.device), grid.store(scales)
        return self._least(lambda: compensated(weight, hessian, grid, fields, DAMPING[0])) / weight.numel()

    @property
    def _threads(self) -> int:
        """That work beside one another on the chunks of a matrix."""
        return torch.get_num_threads() if self.device.type == "cpu" else 1

    def _least(self, work: Callable[[], object]) -> float:
        """Seconds of the fastest of three calls, after one that warms up."""
        found = []
        for _ in range(4):
            self._wait()
            began = time.perf_counter()
            work()
            self._wait()
            found.append(time.perf_counter() - began)
        return min(found[1:])

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def bus_rate(device: torch.device) -> float:
    """Bytes a second from pinned memory of the host to a GPU."""
    source = torch.empty(1 << 26, dtype=torch.uint8, pin_memory=True)
    machine = Machine(device, torch.float32)
    return source.numel() / machine._least(lambda: source.to(device, non_blocking=True))
