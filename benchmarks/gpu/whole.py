"""A whole model of SmolLM2's shape by `signround_edge.quantize`, recipe `fast`: wall time and peaks of memory."""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median

import signround_edge
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.models import Sizes, tiny_sizes, write_random
from benchmarks.gpu.parts import Row
from benchmarks.gpu.timing import peak_memory

_SCHEME = "gguf:q4_0"  # rows of 576 values hold no super-block


def whole_model(bench: Bench) -> Iterator[Row]:
    """The row of the table "whole". Weights are random, and tokens tiny-llama's: the first 3,072 of the vocabulary."""
    settings = signround_edge.RECIPES["fast"]
    if bench.options.tiny:
        settings = replace(settings, steps=2, samples=4, seqlen=16, batch_size=2)
    moments: list[float] = []
    lines: list[str] = []
    with tempfile.TemporaryDirectory() as temporary:
        model, out = Path(temporary) / "model", Path(temporary) / "run"
        write_random(model, (tiny_sizes(blocks=2) if bench.options.tiny else Sizes()).config())
        progress = signround_edge.Progress(lines.append, lambda done, total: moments.append(time.perf_counter()))
        with peak_memory(bench.device) as peaks:
            began = time.perf_counter()
            run = signround_edge.quantize(
                model, _SCHEME, out, settings=settings, device=bench.device.type, progress=progress
            )
            wall_s = time.perf_counter() - began
    each = [later - earlier for earlier, later in itertools.pairwise(moments)]
    parts = len(run.manifest.parts)
    blocks, outside = each[: parts - 1], each[parts - 1]
    yield {
        "table": "whole",
        "what": f"SmolLM2-135M's shape, {parts - 1} blocks" if not bench.options.tiny else "tiny",
        "format": _SCHEME,
        "samples": f"{settings.samples} × {settings.seqlen}",
        "steps": settings.steps,
        "wall_s": wall_s,
        "first_block_s": moments[0] - began + blocks[0],
        "block_s": median(blocks[1:]),
        "outside_s": outside,
        "device_gb": peaks.device,
        "host_gb": peaks.host,
        "last_line": next((line for line in reversed(lines) if "held-out" in line), None),
    }
