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
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from signround_edge.formats import BlockScales, Grid, QuantizedTensor
from signround_edge.formats.grid import Fields, field_rows
from signround_edge.tuning.schedule import V_TRAVEL
from signround_edge.tuning.settings import TuningSettings

# Values a chunk on CPU: all temporaries of a chunk stay in the L2 cache.
_CHUNK_VALUES = 1 << 18


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
        blocks: f32 [R, B, S], the weights whose code positions V shifts: the original ones, or what GPTQ makes of them.
        initial: scales before tuning, [R, B].
        positions: stored fields of the scales that code positions are taken on; None where positions follow the scales.
        v: rounding shift f32 [R, B, S] in [−0.5, 0.5]; one zero seen as so many until the first step.
        alpha, beta: factors of scale and minimum, f32 [R, B]; beta is None where the minimum is not tuned.
        moments: Adam moments per tuned tensor name; empty with SignSGD.
        travel: the first rate of V times the number of steps, unless the settings give a rate.
    """

    grid: Grid
    blocks: Tensor
    initial: BlockScales
    positions: Fields | None
    v: Tensor
    alpha: Tensor
    beta: Tensor | None
    moments: dict[str, AdamMoments]
    travel: float = V_TRAVEL

    @classmethod
    def start(
        cls, grid: Grid, weight: Tensor, initial: BlockScales, positions: str = TuningSettings.positions
    ) -> RoundingState:
        """The state that rounds weight f32 [R, K] to nearest on the initial scales.

        Args:
            positions: "fixed" or "follow"; see `TuningSettings`.
        """
        blocks = grid.blocked(weight)
        alpha, beta = torch.ones_like(initial.scale), None
        fixed = grid.store(initial) if positions == "fixed" else None
        if fixed is not None and grid.integer_zero:
            # The minimum of the integer zero point itself, so that no change of the scale can round it to another.
            initial = replace(initial, minimum=-grid.affine_view(fixed)[1] * initial.scale)
        elif grid.affine:
            beta = torch.ones_like(alpha)
        return cls(grid, blocks, initial, fixed, blocks.new_zeros(()).expand(blocks.shape), alpha, beta, {})

    def rows(self, part: slice) -> RoundingState:
        """The same state for some rows; a view, so updates in place reach this one."""
        return RoundingState(
            self.grid,
            self.blocks[part],
            self.initial.map(lambda t: t[part]),
            None if self.positions is None else field_rows(self.positions, part),
            self.v[part],
            self.alpha[part],
            None if self.beta is None else self.beta[part],
            {k: AdamMoments(m.first[part], m.second[part]) for k, m in self.moments.items()},
            self.travel,
        )

    def fields(self) -> Fields:
        """The scale fields as the format stores them now."""
        minimum = self.initial.minimum
        if minimum is not None:
            minimum = minimum * (self.alpha if self.beta is None else self.beta)
        return self.grid.store(replace(self.initial, scale=self.initial.scale * self.alpha, minimum=minimum))

    def quantized(self) -> QuantizedTensor:
        """Codes and fields of the current state."""
        codes = torch.empty(self.blocks.shape, dtype=self.grid.code_dtype, device=self.blocks.device)
        fields = self.fields()
        for part in row_chunks(self.blocks):
            state = self.rows(part)
            positions = state.positions or field_rows(fields, part)
            codes[part] = self.grid.round_codes(state.blocks, positions, state.v).to(codes.dtype)
        return self.grid.pack_tensor(codes, fields)


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
    if settings.optimizer == "adam" and not state.moments:
        tuned = {"v": state.v, "alpha": state.alpha, "beta": state.beta}
        state.moments = {
            k: AdamMoments(torch.zeros_like(t), torch.zeros_like(t)) for k, t in tuned.items() if t is not None
        }
    rates = learning_rates(settings, state.grid, step, state.travel)
    if compiled:
        # Rates and step go in as tensors: as Python numbers they would be compiled in, anew at every step.
        tensors = [torch.tensor(float(x), device=gradient.device) for x in (*rates, step)]
        _compiled_update()(state, gradient, out, *tensors, settings)
        return
    for part in row_chunks(state.blocks):
        _update(state.rows(part), gradient[part], out[part], *rates, step, settings)


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
    offset = grid.offsets(state.blocks, state.positions or fields)  # u less the anchor, and so are the codes here
    code = (offset + state.v).round_()
    clipped = code.clamp(*grid.offset_range)
    inside = torch.eq(code, clipped, out=torch.empty_like(code))  # 1.0 or 0.0; nine times as fast as a bool cast to f32
    if settings.tune_scales:
        slope = torch.linalg.vecdot(_slope_of_scale(state, clipped, offset, inside, zero), gradient)
        _descend(state, "alpha", state.alpha, slope.mul_(state.initial.scale), lr_scale, step)
        state.alpha.clamp_(*settings.scale_range)
        if state.beta is not None and state.initial.minimum is not None:
            slope = gradient.sum(-1) if state.positions else torch.linalg.vecdot(gradient, 1 - inside)
            _descend(state, "beta", state.beta, slope.mul_(state.initial.minimum), lr_scale, step)
            state.beta.clamp_(*settings.scale_range)
    direction = inside.mul_(gradient).mul_(scale.unsqueeze(-1))
    _descend(state, "v", state.v, direction, lr_v, step)
    state.v.clamp_(-0.5, 0.5)
    _write_weight(state, offset, out)


def _slope_of_scale(state: RoundingState, clipped: Tensor, offset: Tensor, inside: Tensor, zero: Tensor) -> Tensor:
    """∂ŵ/∂s [R, B, S]; the integer zero point `zero` [R, B] counts where positions are fixed."""
    levels = state.grid.levels(clipped)
    if state.positions is None:
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


def _write_weight(state: RoundingState, offset: Tensor, out: Tensor) -> None:
    """The next ŵ; `offset` [R, B, S] is u less the anchor before the step, and is overwritten."""
    grid, fields = state.grid, state.fields()
    if state.positions is None:
        offset = grid.offsets(state.blocks, fields)
    rounded = offset.add_(state.v).round_().clamp_(*grid.offset_range)
    grid.blocked(out).copy_(grid.from_offsets(rounded, fields))


def row_chunks(blocks: Tensor) -> list[slice]:
    """Slices of rows that fit the cache on CPU; one slice on a GPU."""
    rows = blocks.shape[0]
    at_once = rows if blocks.is_cuda else max(1, _CHUNK_VALUES // max(1, blocks[0].numel()))
    return [slice(i, min(rows, i + at_once)) for i in range(0, rows, at_once)]
