"""Where the tuning of a unit starts: at the nearest codes, or at GPTQ's where those are better."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from signround_edge.formats import BlockScales, Grid, QuantizedTensor
from signround_edge.formats.fidelity import lies_on_grid
from signround_edge.formats.scale_search import extreme_scales
from signround_edge.formats.threads import over_chunks
from signround_edge.tuning.block.compute import compute_dtype
from signround_edge.tuning.block.drift import correct_drift
from signround_edge.tuning.block.gptq import DAMPING, compensated
from signround_edge.tuning.block.loss import held_out_loss
from signround_edge.tuning.block.sign_step import RoundingState
from signround_edge.tuning.block.unit import Matrix, Unit
from signround_edge.tuning.schedule import travel_from_gptq
from signround_edge.tuning.settings import TuningSettings

# What less damping must gain over more of it, as a share of the loss: tuning takes up a smaller difference.
_RISK = 0.01
# Values of a matrix, of whose hessian and factor several are in memory at a time.
_SMALL = 1 << 24

Found = TypeVar("Found")


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
    """One matrix as GPTQ gets it.

    Attributes:
        corrected: what to round instead of the matrix's own weight, f32 [R, K].
        scales: on which.
        hessian: f32 [K, K].
        damping: the least.
    """

    matrix: Matrix
    corrected: Tensor | None
    scales: BlockScales
    hessian: Tensor
    damping: float

    def state(self, settings: TuningSettings, damping: float, computed: bool) -> RoundingState:
        """What is tuned, at GPTQ's codes; where those are not `computed`, at others, in memory of their own."""
        damping, grid = max(damping, self.damping), self.matrix.grid
        weight = self.matrix.exact if self.corrected is None else self.corrected
        fields = grid.store(self.scales)
        weight = compensated(weight, self.hessian, grid, fields, damping) if computed else weight.clone()
        return RoundingState.start(grid, weight, self.scales, settings.positions)


def find_start(unit: Unit, settings: TuningSettings, autocast: torch.autocast) -> Start:
    """Round to nearest, and take GPTQ's codes instead where they are wanted and better; what is taken is installed.

    GPTQ is tried with each damping, the safest first; the unit's modules hold the exact weights before. Matrices that
    lie on the grid already keep their codes, and those of experts that are seldom used the nearest ones. All is done
    matrix by matrix, so that nothing of the size of the block exists but what is compared: codes and positions. Of
    several ranks each searches the scales and finds GPTQ's codes of its share of the matrices.
    """
    names = [m.name for m in unit.matrices]
    scales = _initial_scales(unit, settings.scale_init)

    def state(m: Matrix) -> RoundingState:
        return RoundingState.start(m.grid, m.exact, scales[m.name], settings.positions)

    targets, inherited = dict[str, _GptqTarget](), 0.0
    if settings.start == "gptq" and settings.steps:
        targets, inherited = _gptq_targets(unit, scales, settings, autocast)  # needs the exact weights in the modules
    unit.release()

    def first(numbered: tuple[int, Matrix]) -> tuple[QuantizedTensor, bool, list[RoundingState]]:
        """Its nearest codes, whether they stay, and what GPTQ makes of it, whose hessian goes with its last matrix."""
        number, m = numbered
        codes, target = state(m).quantized(), targets.pop(m.name, None)
        if m.seldom or lies_on_grid(m.exact, codes):
            return codes, True, []
        owned = unit.ranks.owns(number)
        return codes, False, [] if target is None else [target.state(settings, d, owned) for d in DAMPING]

    every = dict(zip(names, _of_every_matrix(first, unit.matrices), strict=True))
    nearest, settled = {name: codes for name, (codes, _, _) in every.items()}, {n for n in names if every[n][1]}
    candidates = [{name: made[i] for name, (_, _, made) in every.items() if made} for i in range(len(DAMPING))]
    every.clear()
    for number, name in enumerate(names):
        for candidate in candidates:
            if name in candidate:
                unit.ranks.take(number, candidate[name].positioned)
    dtype = compute_dtype(settings, (m.grid for m in unit.matrices), unit.matrices[0].weight.device)
    unit.install(nearest, dtype)
    rounded = held_out_loss(unit, settings, autocast)
    found, tensors, best = dict[str, RoundingState](), nearest, rounded
    samples = unit.ranks.total(len(unit.train))
    for candidate in filter(None, candidates):
        codes = nearest | quantized(candidate)
        unit.install(codes, dtype)
        loss = held_out_loss(unit, settings, autocast)
        if loss < best * (1 - _RISK if found else 1):
            left = (loss - inherited) / (rounded - inherited) if inherited < loss else 1.0
            for tried in candidate.values():
                tried.travel = travel_from_gptq(settings, tried.grid.codes_a_value, left, samples)
            found, tensors, best = candidate, codes, loss
    candidates.clear()
    unit.install(tensors, dtype)
    states = {m.name: found.get(m.name) or state(m) for m in unit.matrices}
    return Start(nearest, rounded, states, tensors, best, frozenset(settled))


def _of_every_matrix(work: Callable[[tuple[int, Matrix]], Found], matrices: list[Matrix]) -> list[Found]:
    """What `work` makes of each matrix and its number: beside one another where they are many and small, as experts."""
    numbered, largest = list(enumerate(matrices)), max(m.weight.numel() for m in matrices)
    if len(matrices) < 2 * torch.get_num_threads() or largest > _SMALL:
        return [work(pair) for pair in numbered]
    return over_chunks(work, numbered, matrices[0].weight.is_cuda)


def _gptq_targets(
    unit: Unit, nearest: dict[str, BlockScales], settings: TuningSettings, autocast: torch.autocast
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
        scales, corrected = nearest[m.name], found.weights.pop(m.name, None)
        if corrected is not None:
            scales = initial_scales(m.grid, corrected, m.importance, settings.scale_init)
        damping = DAMPING[0] if m.underdetermined else 0.0
        targets[m.name] = _GptqTarget(m, corrected, scales, found.hessians.pop(m.name), damping)
    return targets, found.loss


def _initial_scales(unit: Unit, method: str) -> dict[str, BlockScales]:
    """`initial_scales` of all matrices, by name."""

    def search(numbered: tuple[int, Matrix]) -> BlockScales | None:
        number, m = numbered
        return initial_scales(m.grid, m.exact, m.importance, method) if unit.ranks.owns(number) else None

    found: dict[str, BlockScales] = {}
    for number, own in enumerate(_of_every_matrix(search, unit.matrices)):
        matrix = unit.matrices[number]
        tensors = unit.ranks.of_owner(number, None if own is None else dict(vars(own)), matrix.weight.device)
        scale = tensors.pop("scale")
        assert scale is not None, matrix.name
        found[matrix.name] = BlockScales(scale, **tensors)
    return found


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
