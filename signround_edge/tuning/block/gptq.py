"""Weights that rounding turns into GPTQ's codes (Frantar et al. 2023, arXiv 2210.17323): where tuning starts from.

Columns are rounded one after another, those of the largest H_jj first, with H = Σ x·xᵀ of a matrix's inputs, and what
each loses is made up for by those that are still to come. It is computed in the form of LDLQ (Chee et al. 2023, arXiv
2307.13304, theorem 6), which gives the same codes and needs no inverse of H: with H = Ũ·D·Ũᵀ, D diagonal and Ũ upper
triangular with ones on its diagonal,

    w'_k = w_k + Σ_(j before k) (w_j − ŵ_j)·Ũ_jk    and ŵ_k is w'_k rounded

Scales do not change meanwhile: they are those of the search. What a column has become when its turn comes is kept
unrounded, so that V can go on from there: its code is round(w'/s + z) with V = 0.
"""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

from signround_edge.formats import Grid
from signround_edge.formats.grid import Fields, safe_reciprocal
from signround_edge.tuning.block.gptq_vectors import compensated_vectors
from signround_edge.tuning.block.ldl import ColumnScales, column_factor, one_by_one, spread_errors

# Added to the diagonal of H, as shares of its mean, the safer first: little of it makes the most of many tokens and
# fits the chance of few. See docs/LOG.md.
DAMPING = (0.3, 0.03)


def compensated(weight: Tensor, hessian: Tensor, grid: Grid, fields: Fields, damping: float) -> Tensor:
    """The weight f32 [R, K] whose rounding to nearest on `fields` gives GPTQ's codes.

    It is `weight` itself where the inputs hold NaN or infinities, or H has no factor with this damping.

    Args:
        weight: f32 [R, K].
        hessian: Σ x·xᵀ f32 [K, K] of the inputs.
        fields: scale fields as the grid stores them.
        damping: added to the diagonal of H, as a share of its mean.
    """
    if grid.group > 1:
        return compensated_vectors(weight, hessian, grid, fields, damping)
    order = hessian.diagonal().argsort(descending=True, stable=True)
    found = column_factor(hessian, order, damping)
    if found is None:
        return weight
    factor, _ = found
    # Transposed: a column of the weight is contiguous, and so is its scale.
    scale = grid.affine_view(fields)[0].T.contiguous()
    minimum = grid.from_levels(torch.zeros_like(grid.blocked(weight)[..., :1]), fields)[..., 0].T.contiguous()
    scales = ColumnScales(scale, minimum, safe_reciprocal(scale), order // grid.block_size)
    work = weight.T[order]
    round_columns(work, factor, grid, scales, by_kernel=work.is_cuda and has_triton())
    return torch.empty_like(work).index_copy_(0, order, work).T.contiguous()


def round_columns(work: Tensor, factor: Tensor, grid: Grid, scales: ColumnScales, by_kernel: bool) -> None:
    """Round columns of single values one after another; `work` becomes what they are when their turn comes.

    Args:
        work: the weights, f32 [K, R].
        factor: Ũ f32 [K, K].
        by_kernel: groups of them in one kernel each, as on a GPU, where launches would take most of the time.
    """
    errors = work.clone()
    if by_kernel:
        from signround_edge.tuning.block import gptq_kernel  # not above: torch for CPUs comes without Triton

        factor = factor.contiguous()
        round_group = functools.partial(gptq_kernel.round_group, grid, scales, errors, factor)
        spread_errors(work, errors, factor, round_group, at_once=gptq_kernel.COLUMNS_AT_ONCE)
        return
    scale, minimum, inverse, blocks = scales.scale, scales.minimum, scales.inverse, scales.blocks.tolist()

    def keep_error(j: int) -> None:
        levels = grid.nearest_levels((work[j] - minimum[blocks[j]]).mul_(inverse[blocks[j]]))
        errors[j].sub_(levels.mul_(scale[blocks[j]])).sub_(minimum[blocks[j]])

    spread_errors(work, errors, factor, one_by_one(errors, factor, keep_error))


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None
