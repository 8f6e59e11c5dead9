"""The estimate that `quantize` prints before it starts, and where it puts things so that they fit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from signround_edge.errors import UserError
from signround_edge.formats import get_grid
from signround_edge.manifest import OUTSIDE
from signround_edge.model.decoder import Decoder
from signround_edge.progress import duration, size
from signround_edge.schemes.plan import Plan
from signround_edge.tuning.block.compute import compute_dtype, hidden_dtype
from signround_edge.tuning.calibration.activations import CPU, Store
from signround_edge.tuning.cost.memory import Memory, hidden_bytes, largest_block, outside_bytes, pinned_bytes
from signround_edge.tuning.cost.peak import current_resident, free_memory
from signround_edge.tuning.cost.rates import Machine, bus_rate
from signround_edge.tuning.cost.whole_model import WholeModelShape, whole_model_memory, whole_model_work
from signround_edge.tuning.cost.work import BlockShape, Work, block_shapes, block_work
from signround_edge.tuning.schedule import shares_whole_model
from signround_edge.tuning.settings import TuningSettings

# Of the memory that is free, how much a run may be planned to take.
_FREE_SHARE = 0.9


@dataclass(frozen=True)
class Limits:
    """What a run may take, in bytes; None: what is free.

    Attributes:
        memory: of the host.
        gpu_memory: of the GPU.
    """

    memory: int | None = None
    gpu_memory: int | None = None


UNLIMITED = Limits()


@dataclass(frozen=True)
class Estimate:
    """What a run will cost, and how it is laid out.

    Attributes:
        shapes: the blocks.
        samples: of this process.
        settings: the run's, with the number of parts of a step that fits, and the dtype of hidden states.
        machine: where it runs.
        host, gpu: memory; the GPU's is None without one.
        hidden_on: where the hidden states of all samples are: "gpu", "memory" or "disk".
        resident: what the process takes before, in bytes.
        pinned: whether hidden states in the host's memory are pinned there, so that a GPU copies them by itself.
        whole_model: the work of the whole-model stage.
        codes_on: where that keeps codes between its steps.
    """

    shapes: list[BlockShape]
    samples: int
    settings: TuningSettings
    machine: Machine
    host: Memory
    gpu: Memory | None
    hidden_on: str
    resident: int
    pinned: bool = False
    whole_model: Work = field(default_factory=Work)
    codes_on: torch.device = CPU

    def seconds(self, blocks: int) -> float:
        """Of tuning the last of the blocks and all together, if nothing else runs on the machine."""
        work = self.whole_model
        for shape in self.shapes[len(self.shapes) - blocks :]:
            before, steps = block_work(shape, self.settings, self.samples)
            work += before + steps
        return self.machine.seconds(work)

    @property
    def host_bytes(self) -> float:
        """The peak of the process."""
        return self.resident + self.host.peak

    @property
    def gpu_bytes(self) -> float | None:
        """The peak of what torch allocates there."""
        return None if self.gpu is None else self.gpu.peak

    def store(self, folder: Path) -> Store:
        """Where the hidden states are kept; `folder` is for a file of them."""
        dtype = torch.bfloat16 if self.settings.hidden_dtype == "bfloat16" else torch.float32
        if self.hidden_on == "gpu":
            return Store(self.machine.device, dtype=dtype)
        return Store(folder=folder if self.hidden_on == "disk" else None, dtype=dtype, pinned=self.pinned)

    def line(self, blocks: int) -> str:
        """For people, of so many blocks."""
        parts = [f"about {duration(self.seconds(blocks))}", f"{size(self.host_bytes)} of memory"]
        if self.gpu_bytes is not None:
            parts.append(f"{size(self.gpu_bytes)} of the GPU's")
        compiling = " and some 10 to 60 s of compiling" if self.settings.compile_blocks else ""
        return f"estimate: {', '.join(parts)}{compiling} ({self.breakdown()})"

    def breakdown(self) -> str:
        """What takes the memory."""
        hidden = self.host.hidden if self.gpu is None else self.host.hidden + self.gpu.hidden
        where = {"gpu": " on the GPU", "memory": "", "disk": " on disk"}[self.hidden_on]
        amount = "" if self.hidden_on == "disk" else f" {size(hidden)}"
        block = (self.gpu or self.host).block
        parts = "" if self.settings.step_parts == 1 else f", a step in {self.settings.step_parts} parts"
        whole = (self.gpu or self.host).whole_model
        stage = f"; the whole-model stage {size(whole)}" if whole else ""
        return (
            f"{size(self.resident)} as it starts, a block {size(block)}, hidden states{where}{amount}{parts}; before "
            f"and after the blocks {size(self.host.outside)}{stage}"
        )

    def to_json(self, blocks: int) -> dict[str, Any]:
        """For the run directory."""
        return {
            "seconds": self.seconds(blocks),
            "peak_bytes": round(self.host_bytes),
            "peak_gpu_bytes": None if self.gpu_bytes is None else round(self.gpu_bytes),
            "hidden_on": self.hidden_on,
        }


def estimate(
    plan: Plan,
    decoder: Decoder,
    settings: TuningSettings,
    count: int,
    device: torch.device,
    limits: Limits,
    world: int = 1,
) -> Estimate:
    """What a run will take, laid out so that it keeps the limits.

    Args:
        count: calibration samples of all processes.
        world: how many processes there are.
    Raises:
        UserError: it cannot keep a limit that was given.
    """
    shapes, samples = block_shapes(plan, decoder), -(-count // world)
    grids = {get_grid(m.grid) for shape in shapes for m in shape.matrices}
    width, on_gpu = compute_dtype(settings, grids, device), device.type == "cuda"
    settings = replace(settings, hidden_dtype=hidden_dtype(settings))
    hidden = max(hidden_bytes(shape, settings, samples) for shape in shapes)
    gpu, hidden_on, block, codes_on = None, "memory", 0.0, CPU
    whole_model = WholeModelShape.of(plan, shapes)
    # Where the first process does that stage for all, it has the samples of all.
    sharers, of_stage = (world, samples) if shares_whole_model(settings, count, world) else (1, count)
    whole = whole_model_memory(whole_model, settings, of_stage, width.itemsize, sharers)
    whole_on_host = whole.samples
    if on_gpu:
        room = limits.gpu_memory or _FREE_SHARE * torch.cuda.mem_get_info(device)[0]
        settings, needed = _fitting(shapes, settings, samples, width.itemsize, room)
        codes_on = device if whole.codes + whole.rest <= room else CPU
        whole_on_gpu = whole.rest + (whole.codes if codes_on == device else 0)
        if whole_on_gpu > room:
            raise UserError(
                f"the whole-model stage takes about {size(whole_on_gpu)} of the GPU's memory, and there are "
                f"{size(room)} (--max-gpu-memory); give a shorter --seqlen, a smaller --whole-model-batch-size, or "
                "--whole-model-steps 0"
            )
        hidden_on = "gpu" if max(needed, whole_on_gpu) + hidden <= room else "memory"
        gpu = Memory(needed, hidden if hidden_on == "gpu" else 0, whole_model=whole_on_gpu)
        whole_on_host += whole.codes if codes_on == CPU else 0
    else:
        block = largest_block(shapes, settings, samples, width.itemsize, False)
        whole_on_host += whole.codes + whole.rest
    host, resident = Memory(block, 0, *_outside(plan), whole_on_host), current_resident()
    pinned = False
    if hidden_on == "memory":
        if limits.memory is not None and resident + host.peak + hidden > limits.memory:
            hidden_on = "disk"
        else:
            most = resident + _FREE_SHARE * free_memory() if limits.memory is None else limits.memory
            pinned = on_gpu and resident + host.peak + pinned_bytes(hidden) <= most
            host = replace(host, hidden=pinned_bytes(hidden) if pinned else hidden)
    machine = Machine(device, width, bus_rate(device) if on_gpu and hidden_on != "gpu" else None)
    work = whole_model_work(whole_model, settings, of_stage, sharers)
    found = Estimate(shapes, samples, settings, machine, host, gpu, hidden_on, resident, pinned, work, codes_on)
    if limits.memory is not None and found.host_bytes > limits.memory:
        raise UserError(
            f"--max-memory: this run is estimated to take {size(found.host_bytes)} ({found.breakdown()}), more "
            f"than {size(limits.memory)}; give fewer tokens a step (--batch-size, --seqlen), or allow more"
        )
    return found


def _fitting(
    shapes: Sequence[BlockShape], settings: TuningSettings, samples: int, width: int, room: float
) -> tuple[TuningSettings, float]:
    """The fewest parts of a step that fit on a GPU, and what a block takes then."""
    needed = 0.0
    for parts in range(settings.step_parts, min(settings.batch_size, samples) + 1):
        tried = replace(settings, step_parts=parts)
        needed = largest_block(shapes, tried, samples, width, True)
        if needed <= room:
            return tried, needed
    raise UserError(
        f"a block of this model takes about {size(needed)} of the GPU's memory with one sample at a time, and "
        f"there are {size(room)} (--max-gpu-memory); give a shorter --seqlen, or --device cpu"
    )


def _outside(plan: Plan) -> tuple[float, float]:
    """`outside_bytes` of a model; more than one table looked up by token means that blocks are given their rows."""
    sizes = {entry.name: math.prod(entry.shape) for entry in plan.of_part(OUTSIDE)}
    return outside_bytes(list(sizes.values()), [sizes[name] for name in plan.lookups], len(plan.lookups) > 1)
