"""What tuning must cost on a GPU, on paper: operations, bytes, and the least time and memory that they need.

    python -m benchmarks.cost_model              # the default settings
    python -m benchmarks.cost_model --recipe fast

The counts are those by which `quantize` estimates (`signround_edge/tuning/cost`), the ceilings those of the devices. A
step's floor is the larger of the time for its matrix products and that for the bytes through the device's memory.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from benchmarks.gpu.shapes import SHAPES, Shape
from signround_edge.tuning.cost.memory import block_bytes, hidden_bytes
from signround_edge.tuning.cost.work import BlockShape, MatrixShape, block_work
from signround_edge.tuning.settings import RECIPES, TuningSettings

_GRID = "Q4_K"
_BF16 = 2
# Bytes of a weight in a fused step: gradient and positions read, V read and written, ŵ written.
_STEP_BYTES = 2 + 2 + 2 + 2 + 2
_LAYERS = {"Qwen3-0.6B": 28, "Llama-3-8B": 32, "Llama-3-70B": 80}


@dataclass(frozen=True)
class Device:
    """What a device can do at best: bf16 and f32 operations, bytes of its memory and over the bus, each a second."""

    name: str
    bf16: float
    f32: float
    memory: float
    bus: float
    gigabytes: int


DEVICES = (
    Device("H200", 790e12, 52e12, 4.3e12, 50e9, 139),  # bf16 and memory as measured; the others by its data sheet
    Device("24 GB card", 165e12, 40e12, 1.0e12, 25e9, 24),  # an RTX 4090's data sheet
)


def block_of(shape: Shape) -> BlockShape:
    """A block of the benchmark's shapes, as the estimate has it."""
    first, keys, output, gates, down = shape.products()
    sources = ((first, "input", False), (keys, "input", False), (output, "heads", True), (gates, "norm", False))
    matrices = [
        MatrixShape(rows, cols, _GRID, 1.0, source, corrected)
        for (rows, cols, count), source, corrected in (*sources, (down, "gates", True))
        for _ in range(count)
    ]
    return BlockShape(tuple(matrices), shape.hidden, shape.heads, shape.heads * shape.head_size)


def row(shape: Shape, settings: TuningSettings, device: Device) -> list[str]:
    """One line of the table."""
    block = block_of(shape)
    before, steps = block_work(block, settings, settings.samples)
    a_step = steps.flops / settings.steps
    # The weights are read forward, backward for inputs, and their gradient is written; then the sign step.
    moved = block.weights * (3 * _BF16 + _STEP_BYTES)
    products_ms, memory_ms = 1e3 * a_step / device.bf16, 1e3 * moved / device.memory
    start_s = before.flops / device.bf16 + before.flops_f32 / device.f32
    hidden = hidden_bytes(block, settings, settings.samples)
    parts = 1
    room = 0.9e9 * device.gigabytes
    while parts < settings.batch_size and _needs(block, settings, parts) > room:
        parts += 1
    needed = _needs(block, settings, parts)
    on_gpu = needed + hidden <= room
    bus_ms = 0.0 if on_gpu else 1e3 * steps.bus_bytes / settings.steps / device.bus
    minutes = _LAYERS[shape.name] * (start_s + settings.steps * max(products_ms, memory_ms) / 1e3) / 60
    return [
        shape.name,
        device.name,
        f"{a_step / 1e12:.2f}",
        f"{products_ms:.1f}",
        f"{moved / 1e9:.2f}",
        f"{memory_ms:.2f}",
        f"{bus_ms:.1f}",
        f"{before.flops / 1e12:.0f} + {before.flops_f32 / 1e12:.0f}",
        f"{start_s:.1f}",
        f"{minutes:.1f}",
        f"{(needed + (hidden if on_gpu else 0)) / 1e9:.1f}" + ("" if parts == 1 else f" ({parts} parts)"),
        f"{0 if on_gpu else hidden / 1e9:.1f}",
    ]


def _needs(block: BlockShape, settings: TuningSettings, parts: int) -> float:
    return block_bytes(block, TuningSettings(**{**vars(settings), "step_parts": parts}), settings.samples, _BF16, True)


_HEAD = (
    "block of",
    "on",
    "TFLOP a step",
    "products, ms",
    "GB a step",
    "memory, ms",
    "bus, ms",
    "TFLOP before the steps, bf16 + f32",
    "s",
    "all blocks, min",
    "GPU, GB",
    "hidden states on the host, GB",
)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", choices=list(RECIPES), default="default")
    settings = RECIPES[parser.parse_args().recipe]
    print(f"| {' | '.join(_HEAD)} |\n|{'---|' * len(_HEAD)}")
    for shape in SHAPES.values():
        for device in DEVICES:
            print(f"| {' | '.join(row(shape, settings, device))} |")


if __name__ == "__main__":
    main()
