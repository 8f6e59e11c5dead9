"""Where tuning starts, taken apart: scale search, hessians, correction of drift, GPTQ with each damping."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from unittest import mock

from torch import Tensor

from benchmarks.gpu.bench import Bench, PreparedBlock
from benchmarks.gpu.parts import Row
from benchmarks.gpu.timing import timed
from signround_edge.tuning.block.drift import Corrected, correct_drift
from signround_edge.tuning.block.gptq import DAMPING, compensated
from signround_edge.tuning.block.ldl import column_factor
from signround_edge.tuning.block.loss import held_out_loss
from signround_edge.tuning.block.start import initial_scales
from signround_edge.tuning.block.unit import Matrix


def start(bench: Bench, shape: str, name: str) -> Iterator[Row]:
    """Rows of the table "start": of each shape of matrix, and of the block."""
    block = bench.block(shape, name)
    first = {"table": "start", "block": bench.shape(shape).name, "format": name}
    settings, unit = block.settings, block.unit
    loss = functools.partial(held_out_loss, unit, settings, block.autocast)
    loss()  # warms up
    loss_s = timed(loss, bench.device)
    found: dict[bool, Corrected] = {}

    def correct(change: bool) -> None:
        found.clear()
        block.restore()
        found[change] = correct_drift(unit, settings.batch_size, block.autocast, loss, change)

    with_drift_s = timed(lambda: correct(True), bench.device)
    hessians_s = timed(lambda: correct(False), bench.device) - loss_s
    totals = {"search_s": 0.0, "factor_s": 0.0, "gptq_s": 0.0, "loop_s": 0.0}
    of_shape: dict[tuple[int, ...], list[Matrix]] = {}
    for matrix in unit.matrices:
        of_shape.setdefault(tuple(matrix.exact.shape), []).append(matrix)
    for (rows, cols), matrices in of_shape.items():
        times = _of_matrix(bench, block, matrices[0], found[False].hessians[matrices[0].name])
        yield {**first, "what": f"{rows:,} × {cols:,}", "count": len(matrices), **times}
        for key in totals:
            totals[key] += len(matrices) * times[key]
    pieces = totals["search_s"] + totals["gptq_s"] + with_drift_s + (1 + len(DAMPING)) * loss_s
    yield {
        **first,
        "what": "the block",
        "count": 1,
        **totals,
        "loss_s": loss_s,
        "hessians_s": hessians_s,
        "drift_s": with_drift_s - loss_s - hessians_s,
        "sum_s": pieces,
    }


def _of_matrix(bench: Bench, block: PreparedBlock, matrix: Matrix, hessian: Tensor) -> dict[str, float]:
    """Seconds of one matrix; those of GPTQ are of all dampings, factors included.

    "loop_s" is GPTQ column by column, as it is where Triton is not installed, and on a CPU.
    """
    method = block.settings.scale_init
    scales = initial_scales(matrix.grid, matrix.exact, matrix.importance, method)
    fields = matrix.grid.store(scales)

    def gptq() -> None:
        for damping in DAMPING:
            compensated(matrix.exact, hessian, matrix.grid, fields, damping)

    def factor() -> None:
        order = hessian.diagonal().argsort(descending=True)
        for damping in DAMPING:
            column_factor(hessian, order, damping)

    factor()  # the first call of the solver sets it up
    gptq()  # Triton compiles its kernel
    with mock.patch("signround_edge.tuning.block.gptq.has_triton", return_value=False):
        loop_s = timed(gptq, bench.device)
    return {
        "loop_s": loop_s,
        "search_s": timed(lambda: initial_scales(matrix.grid, matrix.exact, matrix.importance, method), bench.device),
        "factor_s": timed(factor, bench.device),
        "gptq_s": timed(gptq, bench.device),
    }
