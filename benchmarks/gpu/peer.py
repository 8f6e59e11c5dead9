"""The same block through auto-round, where it is installed."""

from __future__ import annotations

import functools
import importlib.util
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.models import write_random
from benchmarks.gpu.parts import Row
from benchmarks.gpu.shapes import VOCABULARY
from benchmarks.gpu.timing import peak_memory, timed

_SCHEME = "W4A16"  # symmetric, 4 bits, groups of 128: our w4g128


def auto_round(bench: Bench, shape: str) -> Iterator[Row]:
    """The row of the table "peer": a model of one such block, tuned with few and with more steps by its defaults."""
    block = bench.shape(shape)
    row = {"table": "peer", "block": block.name, "format": _SCHEME}
    if importlib.util.find_spec("auto_round") is None:
        yield {**row, "why": "not installed"}
        return
    bench.forget_block()
    settings = bench.settings()
    few, more = (2, 4) if bench.options.tiny else (20, 60)
    seconds = {}
    with tempfile.TemporaryDirectory() as temporary, peak_memory(bench.device) as peaks:
        folder = Path(temporary)
        write_random(folder, block.config())
        for steps in (few, few, more):  # the first time loads and compiles what there is to
            seconds[steps] = timed(functools.partial(_tune, bench, folder, steps), bench.device)
    step_s = (seconds[more] - seconds[few]) / (more - few)
    batch = min(settings.batch_size, settings.samples)
    yield {
        **row,
        "samples": f"{settings.samples} × {settings.seqlen}",
        "step_ms": 1e3 * step_s,
        "tflops": block.step_flops(batch, settings.seqlen) / step_s / 1e12,
        "besides_s": seconds[few] - few * step_s,
        "device_gb": peaks.device,
        "host_gb": peaks.host,
    }


def _tune(bench: Bench, folder: Path, steps: int) -> None:
    from auto_round import AutoRound  # type: ignore[import-not-found]

    settings = bench.settings()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCABULARY, (settings.samples, settings.seqlen), generator=generator)
    tuner = AutoRound(
        model,
        AutoTokenizer.from_pretrained(folder),
        scheme=_SCHEME,
        iters=steps,
        nsamples=settings.samples,
        seqlen=settings.seqlen,
        batch_size=settings.batch_size,
        dataset=list(tokens.split(settings.batch_size)),
        device_map=bench.options.device,
    )
    tuner.quantize()
