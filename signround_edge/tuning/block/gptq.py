"""Weights that rounding turns into GPTQ's codes (Frantar et al. 2023, arXiv 2210.17323): where tuning starts from.

With H = Σ x·xᵀ of a matrix's inputs and U the upper Cholesky factor of H⁻¹ (algorithm 1 there), columns are rounded one
after another, those of the largest H_jj first, and what each loses is made up for by those that are still to come:

    E_j = (w_j − ŵ_j) / U_jj,    w_k ← w_k − E_j·U_jk  for k after j

Scales do not change meanwhile: they are those of the search. What a column has become when its turn comes is kept
unrounded, so that V can go on from there: its code is round(w'/s + z) with V = 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from signround_edge.formats import Grid
from signround_edge.formats.grid import Fields, safe_reciprocal

# Added to the diagonal of H, as shares of its mean, the safer first: little of it makes the most of many tokens and
# fits the chance of few. See docs/LOG.md.
DAMPING = (0.3, 0.03)
_COLUMNS_AT_ONCE = 64  # errors reach the columns behind such a group in one product


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
    factor = inverse_factor(hessian[order][:, order], damping)
    if factor is None:
        return weight
    # Transposed: a column of the weight is contiguous, and so is its scale.
    scale = grid.affine_view(fields)[0].T.contiguous()
    minimum = grid.from_levels(torch.zeros_like(grid.blocked(weight)[..., :1]), fields)[..., 0].T.contiguous()
    inverse = safe_reciprocal(scale)
    work = weight.T[order]
    diagonal, blocks = factor.diagonal().tolist(), (order // grid.block_size).tolist()
    for start in range(0, len(work), _COLUMNS_AT_ONCE):
        end = min(start + _COLUMNS_AT_ONCE, len(work))
        errors = torch.empty_like(work[start:end])
        for j in range(start, end):
            block, error = blocks[j], errors[j - start]
            levels = grid.nearest_levels((work[j] - minimum[block]).mul_(inverse[block]))
            torch.sub(work[j], levels.mul_(scale[block]).add_(minimum[block]), out=error)
            error.div_(diagonal[j])
            work[j + 1 : end].addr_(factor[j, j + 1 : end], error, alpha=-1)
        work[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    return torch.empty_like(work).index_copy_(0, order, work).T.contiguous()


def inverse_factor(hessian: Tensor, damping: float) -> Tensor | None:
    """Upper Cholesky factor f32 of the inverse of the damped hessian [K, K], or None where there is none.

    Channels that never fired get a diagonal of 1.
    """
    damped = hessian.double()
    diagonal = damped.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += damping * diagonal.mean()
    lower, failed = torch.linalg.cholesky_ex(damped)
    if failed or not lower.isfinite().all():
        return None
    upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    return None if failed else upper.float()
