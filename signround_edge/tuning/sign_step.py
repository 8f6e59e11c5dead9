"""The fused SignRound step of one weight matrix: from the gradient G = ∂L/∂ŵ to the next ŵ, without autograd.

With s, m the block's scale and minimum, u = w/s + z the code position, V the tuned rounding, q = clip(round(u + V)) and
mask = (u + V rounds to inside the code range), the straight-through estimator gives (arXiv 2309.05516, equations 2–5):

    ∂ŵ/∂V = s·mask
    ∂ŵ/∂s = level(q) − mask·level(u)    with level(u) = u − the grid's anchor; IQ4's table has its own levels
    ∂ŵ/∂m = 1 − mask                    (affine grids; the integer zero point of MatMulNBits follows the minimum)

Only signs are needed, so s enters by its sign. α and β scale the initial s and m.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from signround_edge.formats import BlockScales, Grid, QuantizedTensor
from signround_edge.formats.grid import Fields
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
        blocks: original weights f32 [R, B, S].
        initial: scales before tuning, [R, B].
        v: rounding shift f32 [R, B, S] in [−0.5, 0.5].
        alpha, beta: factors of scale and minimum, f32 [R, B]; beta is None on symmetric grids.
        moments: Adam moments per tuned tensor name; empty with SignSGD.
    """

    grid: Grid
    blocks: Tensor
    initial: BlockScales
    v: Tensor
    alpha: Tensor
    beta: Tensor | None
    moments: dict[str, AdamMoments]

    @classmethod
    def start(cls, grid: Grid, weight: Tensor, initial: BlockScales) -> RoundingState:
        """The state that rounds weight f32 [R, K] to nearest on the initial scales."""
        blocks = grid.blocked(weight)
        alpha = torch.ones_like(initial.scale)
        beta = torch.ones_like(alpha) if grid.affine else None
        return cls(grid, blocks, initial, torch.zeros_like(blocks), alpha, beta, {})

    def rows(self, part: slice) -> RoundingState:
        """The same state for some rows; a view, so updates in place reach this one."""
        return RoundingState(
            self.grid,
            self.blocks[part],
            self.initial.map(lambda t: t[part]),
            self.v[part],
            self.alpha[part],
            None if self.beta is None else self.beta[part],
            {k: AdamMoments(m.first[part], m.second[part]) for k, m in self.moments.items()},
        )

    def fields(self) -> Fields:
        """The scale fields as the format stores them now."""
        minimum = self.initial.minimum
        if minimum is not None and self.beta is not None:
            minimum = minimum * self.beta
        return self.grid.store(replace(self.initial, scale=self.initial.scale * self.alpha, minimum=minimum))

    def quantized(self) -> QuantizedTensor:
        """Codes and fields of the current state."""
        codes = torch.empty(self.blocks.shape, dtype=self.grid.code_dtype, device=self.blocks.device)
        for part in row_chunks(self.blocks):
            state = self.rows(part)
            codes[part] = self.grid.round_codes(state.blocks, state.fields(), state.v).to(codes.dtype)
        return self.grid.pack_tensor(codes, self.fields())


def learning_rates(settings: TuningSettings, step: int) -> tuple[float, float]:
    """Rates of (V, scales) at step 0, 1, …: falling linearly to 0 from 1/steps and half of that, unless given."""
    base = settings.lr or 1 / settings.steps
    decay = 1 - step / settings.steps
    return base * decay, (settings.scale_lr or base / 2) * decay


def fused_step(
    state: RoundingState, gradient: Tensor, out: Tensor, step: int, settings: TuningSettings, compiled: bool = False
) -> None:
    """Update V, α, β in place from G = ∂L/∂ŵ [R, K] and write the next ŵ into out [R, K], both f32 or bf16.

    Args:
        step: number of this step, from 0.
        compiled: one kernel by torch.compile (the way on GPUs) instead of cache-sized chunks of rows (on CPUs).
    """
    if settings.optimizer == "adam" and not state.moments:
        tuned = {"v": state.v, "alpha": state.alpha, "beta": state.beta}
        state.moments = {
            k: AdamMoments(torch.zeros_like(t), torch.zeros_like(t)) for k, t in tuned.items() if t is not None
        }
    rates = learning_rates(settings, step)
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
    scale, _ = grid.affine_view(fields)
    offset = grid.offsets(state.blocks, fields)  # u less the anchor, and so are the codes here
    code = (offset + state.v).round_()
    clipped = code.clamp(*grid.offset_range)
    inside = torch.eq(code, clipped, out=torch.empty_like(code))  # 1.0 or 0.0; nine times as fast as a bool cast to f32
    if settings.tune_scales:
        change = torch.addcmul(grid.levels(clipped), inside, grid.levels(offset), value=-1)
        slope = torch.linalg.vecdot(change, gradient).mul_(state.initial.scale)
        _descend(state, "alpha", state.alpha, slope, lr_scale, step)
        state.alpha.clamp_(*settings.scale_range)
        if state.beta is not None and state.initial.minimum is not None:
            slope = torch.linalg.vecdot(gradient, 1 - inside).mul_(state.initial.minimum)
            _descend(state, "beta", state.beta, slope, lr_scale, step)
            state.beta.clamp_(*settings.scale_range)
    direction = inside.mul_(gradient).mul_(scale.unsqueeze(-1))
    _descend(state, "v", state.v, direction, lr_v, step)
    state.v.clamp_(-0.5, 0.5)
    _write_weight(state, out)


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


def _write_weight(state: RoundingState, out: Tensor) -> None:
    fields = state.fields()
    offsets = state.grid.round_offsets(state.blocks, fields, state.v)
    state.grid.blocked(out).copy_(state.grid.from_offsets(offsets, fields))


def row_chunks(blocks: Tensor) -> list[slice]:
    """Slices of rows that fit the cache on CPU; one slice on a GPU."""
    rows = blocks.shape[0]
    at_once = rows if blocks.is_cuda else max(1, _CHUNK_VALUES // max(1, blocks[0].numel()))
    return [slice(i, min(rows, i + at_once)) for i in range(0, rows, at_once)]
