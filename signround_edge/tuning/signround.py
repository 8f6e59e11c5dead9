"""Tuning one unit (a decoder block, or a single matrix) against its full-precision output: Algorithm 1 of SignRound."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from signround_edge.decoder import is_transposed, set_weight, weight_of
from signround_edge.experts import split_expert
from signround_edge.formats import BlockScales, Grid, QuantizedTensor
from signround_edge.formats.scale_search import extreme_scales
from signround_edge.tuning.drift import corrected_weights
from signround_edge.tuning.gptq import compensated
from signround_edge.tuning.settings import TuningSettings, check_steps, travel_from_gptq
from signround_edge.tuning.sign_step import RoundingState, fused_step
from signround_edge.tuning.statistics import RoundingStatistics, rounding_statistics, v_histogram
from signround_edge.tuning.unit import Unit


@dataclass(frozen=True)
class UnitReport:
    """Losses on the held-out samples.

    Attributes:
        rounded: after rounding to nearest.
        start: of the codes from which tuning starts: GPTQ's, or where those are worse the rounded ones.
        tuned: of what is kept; never above `rounded` and `start`.
        best_step: steps after which the kept rounding was found (0: that from which tuning starts).
    """

    rounded: float
    start: float
    tuned: float
    best_step: int

    def __str__(self) -> str:
        less = 1 - self.tuned / self.rounded if self.rounded else 0.0
        start = f" → {self.start:.3e} by GPTQ" if self.start < self.rounded else ""
        return f"held-out loss {self.rounded:.3e}{start} → {self.tuned:.3e} ({less:.0%} less) at step {self.best_step}"


@dataclass(frozen=True)
class TunedUnit:
    """What tuning a unit gives.

    Attributes:
        tensors: matrix name → codes and scales.
        report: losses before and after.
        statistics: matrix name → what became of its roundings.
    """

    tensors: dict[str, QuantizedTensor]
    report: UnitReport
    statistics: dict[str, RoundingStatistics]


@dataclass(frozen=True)
class _Start:
    """Where the tuning of a unit starts; all dictionaries are by matrix name.

    Attributes:
        nearest: the matrices rounded to nearest on the initial scales.
        rounded: their loss on the held-out samples.
        states, tensors: what is tuned, and its codes and scales at first: `nearest`, or GPTQ's.
        loss: that of `tensors`.
    """

    nearest: dict[str, QuantizedTensor]
    rounded: float
    states: dict[str, RoundingState]
    tensors: dict[str, QuantizedTensor]
    loss: float


def initial_scales(grid: Grid, weight: Tensor, importance: Tensor, method: str) -> BlockScales:
    """Scales before tuning, by weighted search or from each block's extremes."""
    blocks = grid.blocked(weight)
    if method == "absmax":
        return extreme_scales(grid, blocks)
    # A channel that calibration never excites must still be stored sensibly.
    floor = importance.mean() * 1e-4 + 1e-30
    return grid.search(blocks, importance.clamp_min(floor).view(1, -1, grid.block_size))


def tune_unit(unit: Unit, settings: TuningSettings, batches: Iterator[Tensor], device: torch.device) -> TunedUnit:
    """Tune V, α, β of all matrices of a unit; on return the modules hold the kept dequantized weights.

    Args:
        batches: endless iterator of sample indices to train on.
    """
    autocast = compute_context(settings, (m.grid for m in unit.matrices), device)
    start = _start(unit, settings, autocast)
    states, best, best_loss, best_step = start.states, start.tensors, start.loss, 0
    histograms = {name: v_histogram(state) for name, state in states.items()}
    check_at = check_steps(settings.steps, settings.checks)
    dtype = compute_dtype(settings, (m.grid for m in unit.matrices), device)
    weights = _tunable_weights(unit, dtype) if settings.steps else {}
    for step in range(settings.steps):
        index = next(batches)
        with autocast:
            output = unit.forward(index).float()
        output.backward(_loss_gradient(unit, output.detach(), index))
        for matrix in unit.matrices:
            weight = weights[matrix.name]
            if weight.grad is None:  # an expert that no token of these samples was routed to
                assert split_expert(matrix.name)[1] is not None, matrix.name
                continue
            gradient, out = weight.grad, weight.data
            if is_transposed(matrix.module):
                _transposed_step(states[matrix.name], gradient, out, step, settings)
            else:
                fused_step(states[matrix.name], gradient, out, step, settings, compiled=device.type == "cuda")
            weight.grad = None
        if step + 1 in check_at:
            candidate = _quantized(states)
            found = held_out_loss(unit, settings, autocast)
            if found < best_loss:
                best, best_loss, best_step = candidate, found, step + 1
                histograms = {name: v_histogram(state) for name, state in states.items()}
    _install(unit, best)
    statistics = {
        m.name: rounding_statistics(m.weight, start.nearest[m.name], best[m.name], histograms[m.name], m.importance)
        for m in unit.matrices
    }
    return TunedUnit(best, UnitReport(start.rounded, start.loss, best_loss, best_step), statistics)


def _start(unit: Unit, settings: TuningSettings, autocast: torch.autocast) -> _Start:
    """Round to nearest, and take GPTQ's codes instead where they are wanted and better; what is taken is installed."""
    states: dict[str, RoundingState] = {}
    for m in unit.matrices:
        scales = initial_scales(m.grid, m.weight, m.importance, settings.scale_init)
        states[m.name] = RoundingState.start(m.grid, m.weight, scales, settings.positions)
    nearest = _quantized(states)
    compensated_states = None
    if settings.start == "gptq" and settings.steps:
        compensated_states = _compensated(unit, states, settings, autocast)  # needs the exact weights in the modules
    _install(unit, nearest)
    rounded = held_out_loss(unit, settings, autocast)
    if compensated_states is not None:
        tensors = _quantized(compensated_states)
        _install(unit, tensors)
        loss = held_out_loss(unit, settings, autocast)
        if loss < rounded:
            return _Start(nearest, rounded, compensated_states, tensors, loss)
        _install(unit, nearest)
    return _Start(nearest, rounded, states, nearest, rounded)


def _compensated(
    unit: Unit, nearest: dict[str, RoundingState], settings: TuningSettings, autocast: torch.autocast
) -> dict[str, RoundingState]:
    """Where tuning starts from GPTQ's codes, after the correction of drift; modules hold the exact weights before."""
    corrected: dict[str, Tensor] = {}
    if settings.correct_drift:
        loss = functools.partial(held_out_loss, unit, settings, autocast)
        corrected = corrected_weights(unit, settings.batch_size, autocast, loss)
    products = unit.products()
    states = dict(nearest)
    for m in unit.matrices:
        if m.name not in products:
            continue
        scales, weight = nearest[m.name].initial, m.weight
        if m.name in corrected:
            weight = corrected[m.name]
            scales = initial_scales(m.grid, weight, m.importance, settings.scale_init)
        weight = compensated(weight, products[m.name], m.grid, m.grid.store(scales))
        state = RoundingState.start(m.grid, weight, scales, settings.positions)
        states[m.name] = replace(state, travel=travel_from_gptq(settings, m.grid.code_max - m.grid.code_min + 1))
    return states


def _loss_gradient(unit: Unit, output: Tensor, index: Tensor) -> Tensor:
    """∂L/∂output of the mean of `weighted_loss`, in the memory of nothing else: 2/N·weight·(output − target)."""
    target = unit.target(index)
    weights = unit.token_weights(target).mul_(2 / target.numel())
    return (output - target).mul_(weights)


def weighted_loss(unit: Unit, output: Tensor, index: Tensor) -> Tensor:
    """Weighted squared errors of the unit's output for some samples, same shape as the output."""
    target = unit.target(index)
    return (output - target).square() * unit.token_weights(target)


def compute_dtype(settings: TuningSettings, grids: Iterable[Grid], device: torch.device) -> torch.dtype:
    """The dtype of matrix products while a unit on these grids is tuned.

    bfloat16 errs by 0.2 %, a fortieth of what rounding to 4 bits does, but as much as rounding to 8 bits.
    """
    native = device.type == "cuda" or torch.cpu._is_avx512_bf16_supported()
    coarse = all(grid.code_max - grid.code_min < 32 for grid in grids)
    bfloat16 = {"auto": native and coarse, "float32": False, "bfloat16": True}[settings.compute_dtype]
    return torch.bfloat16 if bfloat16 else torch.float32


def compute_context(settings: TuningSettings, grids: Iterable[Grid], device: torch.device) -> torch.autocast:
    """Within, matrix products have `compute_dtype`."""
    dtype = compute_dtype(settings, grids, device)
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)


def _tunable_weights(unit: Unit, dtype: torch.dtype) -> dict[str, nn.Parameter]:
    """Make each module's weight a leaf that receives a gradient: name → parameter.

    It has the dtype of the products, so that neither it nor its gradient is converted at every step.
    """
    return {m.name: set_weight(m.module, weight_of(m.module).to(dtype, copy=True), True) for m in unit.matrices}


def _transposed_step(state: RoundingState, gradient: Tensor, out: Tensor, step: int, settings: TuningSettings) -> None:
    """The step for Conv1D, whose weight is [in, out]."""
    weight = torch.empty_like(out.T, memory_format=torch.contiguous_format)
    fused_step(state, gradient.T.contiguous(), weight, step, settings, compiled=gradient.is_cuda)
    out.copy_(weight.T)


def _quantized(states: dict[str, RoundingState]) -> dict[str, QuantizedTensor]:
    return {name: state.quantized() for name, state in states.items()}


def _install(unit: Unit, tensors: dict[str, QuantizedTensor]) -> None:
    for matrix in unit.matrices:
        matrix.install(tensors[matrix.name].dequantize())


def held_out_loss(unit: Unit, settings: TuningSettings, autocast: torch.autocast) -> float:
    """Loss over the held-out samples, computed as in the training steps but summed in f64."""
    total, count = 0.0, 0
    with torch.no_grad():
        for index in unit.held_out.split(settings.batch_size):
            with autocast:
                output = unit.forward(index)
            loss = weighted_loss(unit, output.float(), index)
            total += float(loss.double().sum())
            count += loss.numel()
    return total / count
