"""GPTQ's start where codes are chosen several at a time: LDLQ with vectors (Tseng et al. 2024, arXiv 2402.04396).

As in `gptq`, but with groups of columns in the place of columns: H = Ũ·D·Ũᵀ, D of blocks of the size of a group and Ũ
with identities on its diagonal. With the factor U of single columns and T its block of a group, those are U·T⁻¹ and
T·D·Tᵀ. What a group has become when its turn comes goes to the vector that is nearest by the diagonal of its block of
D: the whole block gave no better ones, see docs/LOG.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from signround_edge.formats import Grid
from signround_edge.formats.grid import Fields, safe_reciprocal
from signround_edge.tuning.block.ldl import column_factor, one_by_one, spread_errors

# By how much of its way to the vector a group is moved, tried one after another; 1 is the vector itself.
_KEPT = (1.0, 0.5, 0.25)


def compensated_vectors(weight: Tensor, hessian: Tensor, grid: Grid, fields: Fields, damping: float) -> Tensor:
    """The weight f32 [R, K] whose rounding to nearest on `fields` gives GPTQ's codes; as `gptq.compensated`.

    A group whose vector by the diagonal of D is not the nearest one is moved towards it.
    """
    size = grid.group
    groups = hessian.diagonal().view(-1, size).sum(1).argsort(descending=True, stable=True)
    order = (groups.unsqueeze(1) * size + torch.arange(size, device=groups.device)).flatten()
    found = column_factor(hessian, order, damping)
    if found is None:
        return weight
    factor, metric = _of_groups(*found, size)
    scale = grid.affine_view(fields)[0].T.contiguous()
    minimum = grid.from_levels(torch.zeros_like(grid.blocked(weight)[..., :1]), fields)[..., 0].T.contiguous()
    inverse = safe_reciprocal(scale)
    work, errors = weight.T[order], weight.T[order]
    blocks = (order[::size] // grid.block_size).tolist()

    def keep_error(j: int) -> None:
        part, block = slice(j, j + size), blocks[j // size]
        levels = (work[part] - minimum[block]).mul_(inverse[block]).T.contiguous()
        chosen = grid.nearest_offsets(grid.offsets_of_levels(levels), metric[j // size])
        errors[part].sub_(grid.levels(chosen).T * scale[block]).sub_(minimum[block])

    spread_errors(work, errors, factor, one_by_one(errors, factor, keep_error, size), size)
    # errors are w' − ŵ of the groups now, less what came to them
    became = torch.empty_like(work).index_copy_(0, order, work).T.contiguous()
    lost = torch.empty_like(work).index_copy_(0, order, errors).T.contiguous()
    return _held(became, weight - lost, grid, fields)


def _of_groups(factor: Tensor, diagonal: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """(Ũ f32 [K, K], diagonals of the blocks of D [groups, size]) from U and its D [K]."""
    count = len(diagonal) // size
    columns = factor.view(len(factor), count, size).transpose(0, 1)  # [groups, K, size]
    corner = torch.stack([factor[i : i + size, i : i + size] for i in range(0, len(factor), size)])
    whole = torch.linalg.solve_triangular(corner, columns, upper=True, left=False, unitriangular=True)
    metric = (corner.square() * diagonal.view(count, 1, size)).sum(-1)
    return whole.transpose(0, 1).reshape(factor.shape), metric


def _held(weight: Tensor, rounded: Tensor, grid: Grid, fields: Fields) -> Tensor:
    """`weight`, moved where it has to be so that it rounds to the nearest codes of `rounded`; all f32 [R, K]."""
    target, wanted = grid.blocked(rounded), grid.round_offsets(grid.blocked(rounded), fields)
    found = grid.blocked(weight)
    for kept in (*_KEPT[1:], 0.0):
        other = (grid.round_offsets(found, fields) != wanted).view(len(weight), -1, grid.group).any(-1)
        if not bool(other.any()):
            break
        moved = target + (grid.blocked(weight) - target) * kept
        found = torch.where(other.repeat_interleave(grid.group, dim=1).view(found.shape), moved, found)
    return found.reshape(weight.shape)
