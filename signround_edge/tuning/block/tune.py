"""Tuning one unit (a decoder block, or a single matrix) against its full-precision output: Algorithm 1 of SignRound."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from signround_edge.formats import QuantizedTensor
from signround_edge.model.decoder import is_transposed, set_weight, weight_of
from signround_edge.model.experts import split_expert
from signround_edge.tuning.block.compute import compiling, compute_context, compute_dtype
from signround_edge.tuning.block.loss import held_out_loss, loss_gradient
from signround_edge.tuning.block.sign_step import RoundingState, fused_step
from signround_edge.tuning.block.start import find_start, quantized
from signround_edge.tuning.block.statistics import RoundingStatistics, rounding_statistics, v_histogram
from signround_edge.tuning.block.unit import Matrix, Unit
from signround_edge.tuning.ranks import ALONE, Ranks
from signround_edge.tuning.schedule import check_steps
from signround_edge.tuning.settings import TuningSettings


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


def tune_unit(unit: Unit, settings: TuningSettings, batches: Iterator[Tensor], device: torch.device) -> TunedUnit:
    """Tune V, α, β of all matrices of a unit; on return the modules hold the kept dequantized weights.

    Args:
        batches: endless iterator of sample indices to train on; of several ranks each gets its own share of a batch.
    """
    autocast = compute_context(settings, (m.grid for m in unit.matrices), device)
    start = find_start(unit, settings, autocast)
    states, best, best_loss, best_step = start.states, start.tensors, start.loss, 0
    histograms = {name: v_histogram(state) for name, state in states.items()}
    check_at = check_steps(settings.steps, settings.checks)
    dtype = compute_dtype(settings, (m.grid for m in unit.matrices), device)
    tuned = [m for m in unit.matrices if m.name not in start.settled]
    in_all = None if unit.ranks.alone else min(settings.batch_size, unit.ranks.total(len(unit.train)))
    steps = _Steps(states, settings, unit.ranks, in_all)
    if settings.steps:
        steps.watch(tuned, dtype)
    for step in range(settings.steps if tuned else 0):
        with compiling(device):
            steps.take(step, unit, next(batches), autocast)
        if step + 1 in check_at:
            candidate = quantized(states)
            found = held_out_loss(unit, settings, autocast)
            if found < best_loss:
                best, best_loss, best_step = candidate, found, step + 1
                histograms = {name: v_histogram(state) for name, state in states.items()}
    # Positions, V and weights are most of what tuning keeps.
    states.clear()
    steps.weights.clear()
    unit.install(best, dtype)
    statistics = {
        m.name: rounding_statistics(m.exact, start.nearest[m.name], best[m.name], histograms[m.name], m.importance)
        for m in unit.matrices
    }
    return TunedUnit(best, UnitReport(start.rounded, start.loss, best_loss, best_step), statistics)


@dataclass
class _Steps:
    """The steps of a unit's matrices, each taken as soon as its gradient is there.

    On a CPU that is within the backward pass, so that no more than one gradient exists at a time; on a GPU it is after
    it, as compiled kernels are not to be made in the threads of that pass. So it is with several ranks, which add up
    the gradients of one matrix after another, and where a step's samples go through the block in parts.
    """

    states: dict[str, RoundingState]
    settings: TuningSettings
    ranks: Ranks = ALONE
    samples: int | None = None  # of a step on all ranks, where those are several
    step: int = 0
    done: set[str] = field(default_factory=set)
    weights: dict[str, nn.Parameter] = field(default_factory=dict)
    matrices: list[Matrix] = field(default_factory=list)

    def watch(self, matrices: list[Matrix], dtype: torch.dtype) -> None:
        """Make each module's weight a leaf that receives a gradient.

        It has the dtype of the products, so that neither it nor its gradient is converted at every step.
        """
        self.matrices = matrices
        for m in matrices:
            weight = set_weight(m.module, weight_of(m.module).to(dtype, copy=True), True)
            self.weights[m.name] = weight
            if not weight.is_cuda and self.ranks.alone and self.settings.step_parts == 1:
                weight.register_post_accumulate_grad_hook(functools.partial(self._update, m))

    def take(self, step: int, unit: Unit, index: Tensor, autocast: torch.autocast) -> None:
        """One step of all matrices on samples [n]. No output outlives it, which would hold the weights that made it."""
        self.step, self.done = step, set()
        for part in index.chunk(self.settings.step_parts):
            with autocast:
                output = (unit.train_forward or unit.forward)(part).float()
            output.backward(loss_gradient(unit, output.detach(), part, self.samples or len(index)))
            del output
        self.ranks.sum_gradients(self.weights)
        for matrix in self.matrices:
            weight = self.weights[matrix.name]
            if weight.grad is not None:
                self._update(matrix, weight)
            elif matrix.name not in self.done:  # an expert that no token of these samples was routed to
                assert split_expert(matrix.name)[1] is not None, matrix.name

    def _update(self, matrix: Matrix, weight: Tensor) -> None:
        """From a weight's gradient to the next weight, and no gradient."""
        gradient, out, state = weight.grad, weight.data, self.states[matrix.name]
        assert gradient is not None
        with torch.no_grad():
            if is_transposed(matrix.module):
                _transposed_step(state, gradient, out, self.step, self.settings)
            else:
                fused_step(state, gradient, out, self.step, self.settings, compiled=weight.is_cuda)
        weight.grad = None
        self.done.add(matrix.name)


def _transposed_step(state: RoundingState, gradient: Tensor, out: Tensor, step: int, settings: TuningSettings) -> None:
    """The step for Conv1D, whose weight is [in, out]."""
    weight = torch.empty_like(out.T, memory_format=torch.contiguous_format)
    fused_step(state, gradient.T.contiguous(), weight, step, settings, compiled=gradient.is_cuda)
    out.copy_(weight.T)
