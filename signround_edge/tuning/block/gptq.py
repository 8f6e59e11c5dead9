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

from collections.abc import Callable

import torch
from torch import Tensor

from signround_edge.formats import Grid
from signround_edge.formats.grid import Fields, safe_reciprocal

# Added to the diagonal of H, as shares of its mean, the safer first: little of it makes the most of many tokens and
# fits the chance of few. See docs/LOG.md.
DAMPING = (0.3, 0.03)
_COLUMNS_AT_ONCE = 16  # within such a group errors go from column to column


def compensated(weight: Tensor, hessian: Tensor, grid: Grid, fields: Fields, damping: float) -> Tensor:
    """The weight f32 [R, K] whose rounding to nearest on `fields` gives GPTQ's codes.

    It is `weight` itself where the inputs hold NaN or infinities, or H has no factor with this damping.

    Args:
        weight: f32 [R, K].
        hessian: Σ x·xᵀ f32 [K, K] of the inputs.
        fields: scale fields as the grid stores them.
        damping: added to the diagonal of H, as a share of its mean.
    """
    order = hessian.diagonal().argsort(descending=True, stable=True)
    factor = unit_factor(hessian, order, damping)
    if factor is None:
        return weight
    # Transposed: a column of the weight is contiguous, and so is its scale.
    scale = grid.affine_view(fields)[0].T.contiguous()
    minimum = grid.from_levels(torch.zeros_like(grid.blocked(weight)[..., :1]), fields)[..., 0].T.contiguous()
    inverse = safe_reciprocal(scale)
    work, errors = weight.T[order], weight.T[order]
    blocks = (order // grid.block_size).tolist()

    def keep_error(j: int) -> None:
        levels = grid.nearest_levels((work[j] - minimum[blocks[j]]).mul_(inverse[blocks[j]]))
        errors[j].sub_(levels.mul_(scale[blocks[j]])).sub_(minimum[blocks[j]])

    _spread_errors(work, errors, factor, keep_error)
    return torch.empty_like(work).index_copy_(0, order, work).T.contiguous()


def _spread_errors(
    work: Tensor, errors: Tensor, factor: Tensor, keep_error: Callable[[int], None], first: int = 0
) -> None:
    """Round columns one after another; of halves of them, the errors of the first reach the second in one product.

    Args:
        work: what the columns become, f32 [n, R].
        errors: of all columns, f32 [K, R].
        factor: f32 [K, K].
        keep_error: puts the error of a column into `errors` when its turn has come.
        first: number of the first of these columns among all.
    """
    end = first + len(work)
    if len(work) <= _COLUMNS_AT_ONCE:
        for j in range(first, end):
            keep_error(j)
            work[j + 1 - first :].addr_(factor[j, j + 1 : end], errors[j])
        return
    middle = first + len(work) // 2
    before, behind = work[: middle - first], work[middle - first :]
    _spread_errors(before, errors, factor, keep_error, first)
    behind.addmm_(factor[first:middle, middle:end].T, errors[first:middle])
    _spread_errors(behind, errors, factor, keep_error, middle)


def unit_factor(hessian: Tensor, order: Tensor, damping: float) -> Tensor | None:
    """Ũ f32 [K, K] of the damped hessian f32 [K, K] with rows and columns in an order, or None where there is none.

    Channels that never fired get a diagonal of 1. It is found in f32, of half the memory and time, and in f64 only
    where that fails.
    """
    last_first = order.flip(0)
    for dtype in (torch.float32, torch.float64):
        damped = hessian[last_first][:, last_first].to(dtype)
        diagonal = damped.diagonal()
        diagonal[diagonal == 0] = 1
        diagonal += damping * diagonal.mean()
        # H in reverse order is L·Lᵀ; put into order again, L is upper triangular.
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed and lower.isfinite().all():
            factor: Tensor = lower.div_(lower.diagonal().clone()).flip(0, 1).float()
            return factor
    return None
