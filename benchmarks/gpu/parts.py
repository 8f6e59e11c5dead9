"""The parts of a run on a GPU: what each is, in the order of their worth, and how long it is expected to take.

Nothing heavy is imported here: the process that plans and watches never loads torch.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field, replace
from typing import Any

Row = dict[str, Any]

SHAPES = ("Llama-3-8B", "Qwen3-0.6B", "Llama-3-70B")
FORMATS = ("Q4_0", "Q4_K", "IQ4_XS", "w4g128")


@dataclass(frozen=True)
class Options:
    """What all parts of a run share.

    Attributes:
        device: "cuda" or "cpu".
        quick: fewer samples, steps and grids.
        tiny: sizes that one CPU core manages in seconds, to see that all parts work.
    """

    device: str
    quick: bool = False
    tiny: bool = False


@dataclass(frozen=True)
class Part:
    """One part of a run.

    Attributes:
        name: for the user; unique.
        table: where a row goes that says why the part has no figures.
        function: "module:function" of a generator that takes a `Bench` and `arguments`, and yields rows.
        expected_s: seconds; a budget that does not hold them skips the part.
    """

    name: str
    table: str
    function: str
    expected_s: float
    arguments: dict[str, str] = field(default_factory=dict)


def planned(options: Options) -> list[Part]:
    """All parts in the order in which they run.

    The expected times are guesses from launch counts and bandwidths, made before anything had run on a GPU, and mean
    an H200: what remains of a budget decides by them, so they are rather long.
    """
    less = options.quick or options.tiny
    parts = [
        Part("machine", "machine", "benchmarks.gpu.machine:machine", 20),
        Part("ceiling: products", "products", "benchmarks.gpu.ceiling:products", 12),
        Part("ceiling: copies", "copies", "benchmarks.gpu.ceiling:copies", 8),
        Part("check: scale search", "search", "benchmarks.gpu.checks:search", 15 if less else 30),
        Part("check: GPTQ", "gptq", "benchmarks.gpu.checks:gptq", 12),
        Part("check: sign step", "sign_step", "benchmarks.gpu.checks:sign_step", 8),
        Part("check: compiled step", "compiled", "benchmarks.gpu.checks:compiled", 30 if less else 80),
        Part("check: a tuned block", "tuned", "benchmarks.gpu.checks:tuned", 25 if less else 100),
        Part("check: same bytes", "runs", "benchmarks.gpu.runs:same_bytes", 40),
        *_of_block("Llama-3-8B", "Q4_0", options, profile=True),
        Part("check: NaN", "runs", "benchmarks.gpu.runs:not_finite", 25),
    ]
    parts += _of_block("Llama-3-8B", "Q4_K", options)
    parts += _of_block("Llama-3-70B", "Q4_0", options)
    parts.append(Part("whole model: SmolLM2-135M", "whole", "benchmarks.gpu.whole:whole_model", 100))
    parts += _of_block("Qwen3-0.6B", "Q4_0", options)
    for shape in ("Qwen3-0.6B", "Llama-3-8B"):
        arguments = {"shape": shape, "name": "Q4_0"}
        parts.append(Part(f"compiled: {shape}", "compiled_block", "benchmarks.gpu.steps:compiled_block", 60, arguments))
    peer_s = 60 if importlib.util.find_spec("auto_round") else 2
    parts.append(Part("auto-round", "peer", "benchmarks.gpu.peer:auto_round", peer_s, {"shape": "Llama-3-8B"}))
    if options.tiny:
        return [replace(part, expected_s=2) for part in parts]
    named = {part.name for part in parts}
    others = [part for shape in SHAPES for name in FORMATS for part in _of_block(shape, name, options)]
    return parts + [part for part in others if part.name not in named]


def _of_block(shape: str, name: str, options: Options, profile: bool = False) -> list[Part]:
    """The parts of one block on one grid: its step's sections, the whole of its tuning with peaks, its start."""
    large = 3.0 if shape == "Llama-3-70B" else 1.0
    arguments = {"shape": shape, "name": name}
    parts = [
        Part(f"steps: {shape} {name}", "steps", "benchmarks.gpu.steps:apart", 25 + 10 * large, arguments),
        Part(f"block: {shape} {name}", "where", "benchmarks.gpu.block:together", 10 + 15 * large, arguments),
        Part(f"start: {shape} {name}", "start", "benchmarks.gpu.start:start", 5 + 15 * large, arguments),
    ]
    if not options.quick:
        parts[1] = replace(parts[1], expected_s=15 + 30 * large)
    if profile:
        kernels = Part(f"kernels: {shape} {name}", "kernels", "benchmarks.gpu.steps:kernels", 15, arguments)
        parts.insert(2, kernels)
    return parts
