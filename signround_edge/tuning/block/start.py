"""Where the tuning of a unit starts: at the nearest codes, or at GPTQ's where those are better."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from signround_edge.formats import BlockScales, Grid, QuantizedTensor
from signround_edge.formats.fidelity import lies_on_grid
from signround_edge.formats.scale_search import extreme_scales
from signround_edge.tuning.block.drift import correct_drift
from signround_edge.tuning.block.gptq import DAMPING, compensated
from signround_edge.tuning.block.loss import held_out_loss
from signround_edge.tuning.block.sign_step import RoundingState
from signround_edge.tuning.block.unit import Unit
from signround_edge.tuning.schedule import travel_from_gptq
from signround_edge.tuning.settings import TuningSettings

# What less damping must gain over more of it, as a share of the loss: tuning takes up a smaller difference.
_RISK = 0.01


@dataclass(frozen=True)
class Start:
    """Where the tuning of a unit starts; all dictionaries are by matrix name.

    Attributes:
        nearest: the matrices rounded to nearest on the initial scales.
        rounded: their loss on the held-out samples.
        states, tensors: what is tuned, and its codes and scales at first: `nearest`, or GPTQ's.
        loss: that of `tensors`.
        settled: matrices that are not tuned: they lie on the grid already, or belong to experts that too few tokens
            came to.
    """

    nearest: dict[str, QuantizedTensor]
    rounded: float
    states: dict[str, RoundingState]
    tensors: dict[str, QuantizedTensor]
    loss: float
    settled: frozenset[str]


@dataclass(frozen=True)
class _GptqTarget:
    """One matrix as GPTQ gets it: what to round, f32 [R, K], on which scales, the hessian f32 [K, K], least damping."""

    grid: Grid
    weight: Tensor
    scales: BlockScales
    hessian: Tensor
    damping: float

    @property
    def codes(self) -> int:
        """How many the grid has."""
        return self.grid.code_max - self.grid.code_min + 1

    def state(self, settings: TuningSettings, damping: float) -> RoundingState:
        """What is tuned, at GPTQ's codes."""
        damping = max(damping, self.damping)
        weight = compensated(self.weight, self.hessian, self.grid, self.grid.store(self.scales), damping)
        return RoundingState.start(self.grid, weight, self.scales, settings.positions)


def find_start(unit: Unit, settings: TuningSettings, autocast: torch.autocast) -> Start:
    """Round to nearest, and take GPTQ's codes instead where they are wanted and better; what is taken is installed.

    GPTQ is tried with each damping, the safest first; the unit's modules hold the exact weights before. Matrices that
    lie on the grid already keep their codes, and those of experts that are seldom used the nearest ones.
    """
    states: dict[str, RoundingState] = {}
    for m in unit.matrices:
        scales = initial_scales(m.grid, m.weight, m.importance, settings.scale_init)
        states[m.name] = RoundingState.start(m.grid, m.weight, scales, settings.positions)
    targets, inherited = dict[str, _GptqTarget](), 0.0
    if settings.start == "gptq" and settings.steps:
        targets, inherited = _gptq_targets(unit, states, settings, autocast)  # needs the exact weights in the modules
    nearest = quantized(states)
    settled = frozenset(m.name for m in unit.matrices if lies_on_grid(m.weight, nearest[m.name]) or m.seldom)
    targets = {name: target for name, target in targets.items() if name not in settled}
    unit.install(nearest)
    rounded = held_out_loss(unit, settings, autocast)
    start = Start(nearest, rounded, states, nearest, rounded, settled)
    for damping in DAMPING if targets else ():
        candidate = states | {name: target.state(settings, damping) for name, target in targets.items()}
        tensors = quantized(candidate)
        unit.install(tensors)
        loss = held_out_loss(unit, settings, autocast)
        if loss < start.loss * (1 - _RISK if start.states is not states else 1):
            left = (loss - inherited) / (rounded - inherited) if inherited < loss else 1.0
            for name, target in targets.items():
                candidate[name].travel = travel_from_gptq(settings, target.codes, left, len(unit.train))
            start = Start(nearest, rounded, candidate, tensors, loss, settled)
    unit.install(start.tensors)
    return start


def _gptq_targets(
    unit: Unit, nearest: dict[str, RoundingState], settings: TuningSettings, autocast: torch.autocast
) -> tuple[dict[str, _GptqTarget], float]:
    """What GPTQ rounds, after the correction of drift, and the unit's held-out loss if nothing were rounded.

    Modules hold the exact weights before, the corrected ones after.
    """
    loss = functools.partial(held_out_loss, unit, settings, autocast)
    found = correct_drift(unit, settings.batch_size, autocast, loss, settings.correct_drift)
    targets: dict[str, _GptqTarget] = {}
    for m in unit.matrices:
        if m.name not in found.hessians:
            continue
        scales, weight = nearest[m.name].initial, m.weight
        if m.name in found.weights:
            weight = found.weights[m.name]
            scales = initial_scales(m.grid, weight, m.importance, settings.scale_init)
        damping = DAMPING[0] if m.underdetermined else 0.0
        targets[m.name] = _GptqTarget(m.grid, weight, scales, found.hessians[m.name], damping)
    return targets, found.loss


def initial_scales(grid: Grid, weight: Tensor, importance: Tensor, method: str) -> BlockScales:
    """Scales before tuning, by weighted search or from each block's extremes."""
    blocks = grid.blocked(weight)
    if method == "absmax":
        return extreme_scales(grid, blocks)
    # A channel that calibration never excites must still be stored sensibly.
    floor = importance.mean() * 1e-4 + 1e-30
    return grid.search(blocks, importance.clamp_min(floor).view(1, -1, grid.block_size))


def quantized(states: dict[str, RoundingState]) -> dict[str, QuantizedTensor]:
    """Codes and scales of all states, by matrix name."""
    return {name: state.quantized() for name, state in states.items()}
