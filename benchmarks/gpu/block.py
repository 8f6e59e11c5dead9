"""The whole of a block's tuning by `tune_unit`: where its time goes, and its peaks of memory."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from statistics import median

import torch._dynamo
from torch._dynamo.utils import counters

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.parts import Row
from benchmarks.gpu.timing import Moment, StepClock, median_seconds, peak_memory, synchronize
from signround_edge.tuning.block.tune import tune_unit
from signround_edge.tuning.schedule import check_steps
from signround_edge.tuning.settings import TuningSettings


def together(bench: Bench, shape: str, name: str) -> Iterator[Row]:
    """Rows of the tables "where" and "memory"."""
    block, device = bench.block(shape, name), bench.device
    torch._dynamo.reset()  # as in a process that tunes this block alone
    counters.clear()
    settings, unit = block.settings, block.unit
    clock = StepClock(block.job.batches(0, unit.train), device)
    with peak_memory(device) as peaks:
        synchronize(device)
        began = Moment(device)
        tuned = tune_unit(unit, settings, clock, device)
        ended = Moment(device)
        total_s = began.until(ended)
    moments = clock.moments
    each = [one.until(next_one) for one, next_one in itertools.pairwise(moments)]
    checked = check_steps(settings.steps, settings.checks)
    step_s = median(seconds for number, seconds in enumerate(each, 1) if number > 1 and number not in checked)
    start_s = began.until(moments[0])
    compile_s = each[0] - step_s
    checks = [seconds - step_s for number, seconds in enumerate(each, 1) if number in checked]
    check_s = median(checks) if checks else 0.0
    rest_s = moments[-1].until(ended) - step_s - check_s
    copied_s = median_seconds(lambda: (block.batch_inputs(), unit.target(block.batch)), device, 3)
    default = TuningSettings()
    parts_s = {"start": start_s, "steps": default.steps * step_s, "checks": default.checks * check_s, "rest": rest_s}
    whole_s = sum(parts_s.values())
    first = {"block": bench.shape(shape).name, "format": name}
    yield {
        **first,
        "table": "where",
        "dtype": str(block.dtype).removeprefix("torch."),
        "samples": f"{settings.samples} × {settings.seqlen}",
        "steps": settings.steps,
        "pass_s": block.pass_s,
        "start_s": start_s,
        "compile_s": compile_s,
        "graphs": counters["stats"]["unique_graphs"],
        "step_ms": 1e3 * step_s,
        "tflops": bench.shape(shape).step_flops(len(block.batch), settings.seqlen) / step_s / 1e12,
        "check_s": check_s,
        "rest_s": rest_s,
        "total_s": total_s,
        **{f"{part}_percent": 100 * seconds / whole_s for part, seconds in parts_s.items()},
        "copies_percent": 100 * default.steps * copied_s / whole_s,
        "loss_rounded": tuned.report.rounded,
        "loss_start": tuned.report.start,
        "loss_tuned": tuned.report.tuned,
    }
    weights = bench.shape(shape).weights()
    yield {
        **first,
        "table": "memory",
        "weights_gb": 4 * weights / 1e9,
        "start_gb": clock.start_peak,
        "steps_gb": peaks.device,
        "start_bytes_a_weight": clock.start_peak and 1e9 * clock.start_peak / weights,
        "steps_bytes_a_weight": peaks.device and 1e9 * peaks.device / weights,
        "reserved_gb": peaks.reserved,
        "host_before_gb": peaks.host_before,
        "host_gb": peaks.host,
        "activations_gb": sum(t.numel() * t.element_size() for t in (block.inputs, block.target)) / 1e9,
    }
