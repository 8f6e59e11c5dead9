"""The fused SignRound step of one weight matrix: from the gradient G = ∂L/∂ŵ to the next ŵ, without autograd.

With s, m the block's scale and minimum, u = w/s + z the code position, V the tuned rounding, q = clip(round(u + V)) and
mask = (u + V rounds to inside the code range), ŵ = s·level(q) + m and level(u) = u − the grid's anchor (IQ4's table has
its own levels). α and β scale the initial s and m. Only signs of gradients are needed, so s enters by its sign.

Code positions are fixed: u is taken once, on the initial scales, and α and β change what a code is worth:

    ∂ŵ/∂V = s·mask      ∂ŵ/∂s = level(q)      ∂ŵ/∂m = 1

An integer zero point z (MatMulNBits) stays what it is, ŵ = s·(q − z), and there is no β.

Or they follow the scales, as in the paper (arXiv 2309.05516, equations 2–5), where the straight-through estimator gives

    ∂ŵ/∂V = s·mask      ∂ŵ/∂s = level(q) − mask·level(u)      ∂ŵ/∂m = 1 − mask

and every step of α and β moves all codes of a block past V, whether or not they are to move: see docs/LOG.md.

A state takes 4 bytes a weight: fixed positions and V are integers in units of a power of two, whose sum f32 holds
exactly, so that no device and no compiler can round u + V otherwise than another.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from signround_edge.formats import BlockScales, Grid, QuantizedTensor
from signround_edge.formats.grid import Fields, field_rows
from signround_edge.formats.threads import over_chunks
from signround_edge.tuning.schedule import V_TRAVEL
from signround_edge.tuning.settings import TuningSettings

# Values a chunk on CPU: all temporaries of a chunk stay in the L2 cache.
_CHUNK_VALUES = 1 << 18
# V is stored in units of 1/65,536: a last step of 1,000 is still one.
_V_UNIT = 2.0**-16
_INT16 = (-(1 << 15), (1 << 15) - 1)


@dataclass
class AdamMoments:
    """First and second moments of one tuned tensor."""

    first: Tensor
    second: Tensor


@dataclass
class RoundingState:
    """What is tuned for one matrix of R rows, B blocks a row, S values a block.

    Attributes:
        grid: the target grid.
        initial: scales before tuning, [R, B].
        positions: u less the anchor on the stored initial scales, int16 [R, B, S] in units of `position_unit`; those of
            weights far beyond the codes' range are at its end. None where positions follow the scales.
        weights: f32 [R, B, S], whose positions follow the scales; None where they are fixed.
        v: rounding shift int16 [R, B, S] in units of 2⁻¹⁶, one zero seen as so many until the first step.
        alpha, beta: factors of scale and minimum, f32 [R, B]; beta is None where the minimum is not tuned.
        moments: Adam moments per tuned tensor name; empty with SignSGD.
        codes: those of the last step, in the grid's dtype [R, B, S], where choosing them is slow: on grids of vectors;
            None before the first step and on other grids.
        travel: the first rate of V times the number of steps, unless the settings give a rate.
        schedule: rates of V and of scales, and the number, of each step: f32 [steps, 3, 4], of which compiled steps
            read the first of four; None before the first of those.
    """

    grid: Grid
    initial: BlockScales
    positions: Tensor | None
    weights: Tensor | None
    v: Tensor
    alpha: Tensor
    beta: Tensor | None
    moments: dict[str, AdamMoments]
    travel: float = V_TRAVEL
    codes: Tensor | None = None
    schedule: Tensor | None = None

    @classmethod
    def start(
        cls, grid: Grid, weight: Tensor, initial: BlockScales, positions: str = TuningSettings.positions
    ) -> RoundingState:
        """The state that rounds weight f32 [R, K] to nearest on the initial scales.

        Args:
            positions: "fixed" or "follow"; see `TuningSettings`.
        """
        blocks = grid.blocked(weight)
        alpha, beta, fixed = torch.ones_like(initial.scale), None, None
        if positions == "fixed":
            fields = grid.store(initial)
            fixed = _fixed_positions(grid, blocks, fields)
            if grid.integer_zero:
                # The minimum of the integer zero point itself, so that no change of the scale rounds it to another.
                initial = replace(initial, minimum=-grid.affine_view(fields)[1] * initial.scale)
        if grid.affine and not (fixed is not None and grid.integer_zero):
            beta = torch.ones_like(alpha)
        v = torch.zeros((), dtype=torch.int16, device=blocks.device).expand(blocks.shape)
        return cls(grid, initial, fixed, blocks if fixed is None else None, v, alpha, beta, {})

    def rows(self, part: slice) -> RoundingState:
        """The same state for some rows; a view, so updates in place reach this one."""

        def some(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[part]

        return RoundingState(
            self.grid,
            self.initial.map(lambda t: t[part]),
            some(self.positions),
            some(self.weights),
            self.v[part],
            self.alpha[part],
            some(self.beta),
            {k: AdamMoments(m.first[part], m.second[part]) for k, m in self.moments.items()},
            self.travel,
            some(self.codes),
        )

    @property
    def positioned(self) -> Tensor:
        """What says where weights lie among the codes: positions, or the weights where those follow the scales."""
        found = self.weights if self.positions is None else self.positions
        assert found is not None
        return found

    @property
    def shift(self) -> Tensor:
        """V itself, f32 [R, B, S]."""
        return self.v.float().mul_(_V_UNIT)

    @shift.setter
    def shift(self, shift: Tensor) -> None:
        self.v = shift.div(_V_UNIT).round_().clamp_(*_INT16).to(torch.int16)
        self.codes = None

    def offsets(self, fields: Fields) -> Tensor:
        """u less the anchor f32 [R, B, S]; on `fields` where positions follow the scales."""
        if self.positions is not None:
            return self.positions.float().mul_(position_unit(self.grid))
        assert self.weights is not None
        return self.grid.offsets(self.weights, fields)

    def fields(self) -> Fields:
        """The scale fields as the format stores them now."""
        minimum = self.initial.minimum
        if minimum is not None:
            minimum = minimum * (self.alpha if self.beta is None else self.beta)
        return self.grid.store(replace(self.initial, scale=self.initial.scale * self.alpha, minimum=minimum))

    def quantized(self) -> QuantizedTensor:
        """Codes and fields of the current state."""
        fields = self.fields()
        codes = self.codes_on(fields) if self.codes is None else self.codes.clone()
        return self.grid.pack_tensor(codes, fields)

    def codes_on(self, fields: Fields) -> Tensor:
        """Codes of the current positions [R, B, S]; on `fields` where those follow the scales."""
        codes = torch.empty(self.v.shape, dtype=self.grid.code_dtype, device=self.v.device)

        def choose(part: slice) -> None:
            state = self.rows(part)
            position = state.offsets(field_rows(fields, part)).add_(state.v.float(), alpha=_V_UNIT)
            codes[part] = self.grid.nearest_offsets(position).add_(self.grid.anchor).to(codes.dtype)

        over_chunks(choose, row_chunks(self.v), self.v.is_cuda)
        return codes


def position_unit(grid: Grid) -> float:
    """In what fixed positions are counted: the power of two that makes the most of 16 bits."""
    return 2.0 ** -math.floor(math.log2((1 << 15) / (1 + max(map(abs, grid.offset_range)))))


def _fixed_positions(grid: Grid, blocks: Tensor, fields: Fields) -> Tensor:
    """`RoundingState.positions`; without V they round to the codes that the weights themselves round to."""
    found, unit = torch.empty(blocks.shape, dtype=torch.int16, device=blocks.device), position_unit(grid)
    for part in row_chunks(blocks):
        offsets = grid.offsets(blocks[part], field_rows(fields, part))
        units = offsets.div(unit).round_()
        if grid.group > 1:  # choosing vectors knows no such ties
            found[part] = units.clamp_(*_INT16).to(torch.int16)
            continue
        # What lies next to a tie may have been put on it, which goes to the even code: one unit back.
        crossed = units.mul(unit).round_().sub_(offsets.round_()).sign_()
        found[part] = units.sub_(crossed).clamp_(*_INT16).to(torch.int16)
    return found


def learning_rates(settings: TuningSettings, grid: Grid, step: int, travel: float = V_TRAVEL) -> tuple[float, float]:
    """Rates of (V, scales) at step 0, 1, …, falling linearly to 0; see `TuningSettings` for where they start."""
    base = settings.lr or travel / settings.steps
    decay = 1 - step / settings.steps
    farthest = max(map(abs, grid.offset_range))
    return base * decay, (settings.scale_lr or base / farthest) * decay


def fused_step(
    state: RoundingState, gradient: Tensor, out: Tensor, step: int, settings: TuningSettings, compiled: bool = False
) -> None:
    """Update V, α, β in place from G = ∂L/∂ŵ [R, K] and write the next ŵ into out [R, K], both f32 or bf16.

    Args:
        step: number of this step, from 0.
        compiled: one kernel by torch.compile (the way on GPUs) instead of cache-sized chunks of rows (on CPUs).
    """
    state.v = state.v.contiguous()
    if state.grid.group > 1 and state.codes is None:
        state.codes = state.codes_on(state.fields())
    if settings.optimizer == "adam" and not state.moments:
        tuned = {"v": state.v, "alpha": state.alpha, "beta": state.beta}
        state.moments = {
            k: AdamMoments(torch.zeros_like(t, dtype=torch.float32), torch.zeros_like(t, dtype=torch.float32))
            for k, t in tuned.items()
            if t is not None
        }
    rates = learning_rates(settings, state.grid, step, state.travel)
    if compiled:
        if state.schedule is None:
            state.schedule = _schedule(state, settings, gradient.device)
        _compiled_update()(state, gradient, out, *state.schedule[step, :, 0].unbind(), settings)
        return

    def update(part: slice) -> None:
        _update(state.rows(part), gradient[part], out[part], *rates, step, settings)

    over_chunks(update, row_chunks(state.v), state.v.is_cuda)


def _schedule(state: RoundingState, settings: TuningSettings, device: torch.device) -> Tensor:
    """`RoundingState.schedule`.

    Rates and step go into a compiled step as tensors: as Python numbers they would be compiled in, anew at every step;
    made at every step they would each be copied to the device, and waited for. Compiled kernels want them 16 bytes
    apart.
    """
    every = [(*learning_rates(settings, state.grid, step, state.travel), step) for step in range(settings.steps)]
    return torch.tensor(every, dtype=torch.float32, device=device).unsqueeze(-1).repeat(1, 1, 4)


@functools.cache
def _compiled_update() -> Callable[..., None]:
    # Without this option inductor drops the round trip of scales through fp16, and ŵ leaves the grid.
    exact: dict[str, Any] = {"emulate_precision_casts": True}
    compiled: Callable[..., None] = torch.compile(_update, dynamic=False, options=exact)
    return compiled


def _update(
    state: RoundingState,
    gradient: Tensor,  # [R, K]
    out: Tensor,  # [R, K]
    lr_v: Tensor | float,
    lr_scale: Tensor | float,
    step: Tensor | int,
    settings: TuningSettings,
) -> None:
    grid = state.grid
    gradient = grid.blocked(gradient).float()
    fields = state.fields()
    scale, zero = grid.affine_view(fields)
    offset, units = state.offsets(fields), state.v.float()  # u less the anchor, and so are the codes here
    code = offset.add(units, alpha=_V_UNIT).round_()
    clipped = code.clamp(*grid.offset_range)
    inside = torch.eq(code, clipped, out=torch.empty_like(code))  # 1.0 or 0.0; nine times as fast as a bool cast to f32
    if state.codes is not None:
        clipped = state.codes.float().sub_(grid.anchor)
    if settings.tune_scales:
        slope = torch.linalg.vecdot(_slope_of_scale(state, clipped, offset, inside, zero), gradient)
        _descend(state, "alpha", state.alpha, slope.mul_(state.initial.scale), lr_scale, step)
        state.alpha.clamp_(*settings.scale_range)
        if state.beta is not None and state.initial.minimum is not None:
            slope = gradient.sum(-1) if state.weights is None else torch.linalg.vecdot(gradient, 1 - inside)
            _descend(state, "beta", state.beta, slope.mul_(state.initial.minimum), lr_scale, step)
            state.beta.clamp_(*settings.scale_range)
    direction = inside.mul_(gradient).mul_(scale.unsqueeze(-1))
    _descend(state, "v", units, direction, lr_v / _V_UNIT, step)
    state.v.copy_(units.round_().clamp_(*_INT16))
    _write_weight(state, offset, units, out)


def _slope_of_scale(state: RoundingState, clipped: Tensor, offset: Tensor, inside: Tensor, zero: Tensor) -> Tensor:
    """∂ŵ/∂s [R, B, S]; the integer zero point `zero` [R, B] counts where positions are fixed."""
    levels = state.grid.levels(clipped)
    if state.weights is not None:
        return torch.addcmul(levels, inside, state.grid.levels(offset), value=-1)
    return levels - zero.unsqueeze(-1) if state.grid.integer_zero else levels


def _descend(
    state: RoundingState, name: str, value: Tensor, slope: Tensor, lr: Tensor | float, step: Tensor | int
) -> None:
    """One descent step in place: lr·sign(slope), or Adam's (Kingma and Ba 2015, algorithm 1) where moments exist."""
    if name not in state.moments:
        direction = slope.sign_()
        value.sub_(direction, alpha=lr) if isinstance(lr, float) else value.sub_(direction.mul_(lr))
        return
    moments = state.moments[name]
    moments.first.lerp_(slope, 0.1)
    moments.second.lerp_(slope.square(), 0.001)
    mean = moments.first / (1 - 0.9 ** (step + 1))
    # Adam's usual 1e-8 would swamp these gradients; the constant only has to keep 0/0 away.
    spread = (moments.second / (1 - 0.999 ** (step + 1))).sqrt_().add_(1e-30)
    value.sub_(mean.div_(spread).mul_(lr))


def _write_weight(state: RoundingState, offset: Tensor, units: Tensor, out: Tensor) -> None:
    """The next ŵ; `offset` [R, B, S] is u less the anchor before the step, and is overwritten; `units` is V's, f32."""
    grid, fields = state.grid, state.fields()
    if state.weights is not None:
        offset = grid.offsets(state.weights, fields)
    rounded = grid.nearest_offsets(offset.add_(units, alpha=_V_UNIT))
    if state.codes is not None:
        state.codes.copy_(rounded + grid.anchor)
    grid.blocked(out).copy_(grid.from_offsets(rounded, fields))


def row_chunks(blocks: Tensor) -> list[slice]:
    """Slices of rows that fit the cache on CPU; one slice on a GPU."""
    rows = blocks.shape[0]
    at_once = rows if blocks.is_cuda else max(1, _CHUNK_VALUES // max(1, blocks[0].numel()))
    return [slice(i, min(rows, i + at_once)) for i in range(0, rows, at_once)]
