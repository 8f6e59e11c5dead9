"""Weighted search of scales for vector grids, where rounding is what costs time.

Candidates of each sub-block are rounded once; with the levels found, the best real-valued scale and its error are known:

    s* = Σ h·w·l / Σ h·l²        Σ h·(w − s*·l)² = Σ h·w² − (Σ h·w·l)² / Σ h·l²

Then super-scales and sub-scales are refitted in turn as for other grids with super-blocks (`super_search`), and each
sub-scale code tries its neighbours. All errors are of the stored fields.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from signround_edge.formats.grid import BlockScales, Fields, safe_reciprocal
from signround_edge.formats.scale_search import in_row_chunks, weighted_error
from signround_edge.formats.super_search import choose, refit_supers

if TYPE_CHECKING:
    from signround_edge.formats.ggml_vectors import VectorGrid

# Scales relative to the one that maps the largest magnitude of a block to the table's largest.
FACTORS = (0.6, 0.75, 0.9, 1.05)
SUPER_FACTORS = (1.0, 0.9)
ROUNDS = 2


def search_vectors(grid: VectorGrid, blocks: Tensor, importance: Tensor) -> BlockScales:
    """Best stored scales of each super-block. Shapes as in `Grid.search`."""
    return in_row_chunks(lambda w, h: _search(grid, w, h), blocks, importance)


def _search(grid: VectorGrid, blocks: Tensor, importance: Tensor) -> BlockScales:
    scale = _free_scales(grid, blocks, importance)
    best = grid.store(BlockScales(scale))
    derived = grid.scales_of(best).super_scale
    assert derived is not None
    best_error = torch.full(derived.shape, torch.inf, device=blocks.device)
    for factor in SUPER_FACTORS:
        scales = BlockScales(scale, super_scale=derived * factor)
        for _ in range(ROUNDS):
            fields = grid.store(scales)
            levels = grid.round_levels(blocks, fields)
            error = grid.per_super(weighted_error(grid, blocks, importance, fields, levels)).sum(-1)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best = {name: choose(grid, better, fields[name], best[name]) for name in best}
            fitted, _ = _fit(blocks, importance, levels)
            scales = BlockScales(fitted, super_scale=refit_supers(grid, blocks, importance, levels, fields)[0])
    return grid.scales_of(_try_neighbours(grid, blocks, importance, best))


def _free_scales(grid: VectorGrid, blocks: Tensor, importance: Tensor) -> Tensor:
    """The best real-valued scale of each sub-block, f32 [R, B]."""
    extreme = blocks.abs().amax(dim=-1) / grid.table[-1]
    best, most = extreme, torch.full(extreme.shape, -torch.inf, device=blocks.device)
    for factor in FACTORS:
        inverse = safe_reciprocal(extreme * factor).unsqueeze(-1)
        fitted, gain = _fit(blocks, importance, grid.nearest_levels(blocks * inverse))
        better = gain > most
        best, most = torch.where(better, fitted, best), torch.where(better, gain, most)
    return best


def _fit(blocks: Tensor, importance: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """(s*, by how much it lowers the error below that of zeros), f32 [R, B]; s* is not negative."""
    weighted = importance * levels
    products = (weighted * blocks).sum(-1).clamp_(min=0)
    scale = products * safe_reciprocal((weighted * levels).sum(-1))
    return scale, products * scale


def _try_neighbours(grid: VectorGrid, blocks: Tensor, importance: Tensor, fields: Fields) -> Fields:
    """Each sub-block takes the neighbouring sub-scale code where it errs less."""
    best = fields["sub_scale"]
    least = weighted_error(grid, blocks, importance, fields)
    for move in (-1, 1):
        moved = (fields["sub_scale"].to(torch.int16) + move).clamp_(0, grid.sub_max).to(torch.uint8)
        error = weighted_error(grid, blocks, importance, {**fields, "sub_scale": moved})
        best, least = torch.where(error < least, moved, best), torch.minimum(error, least)
    return {**fields, "sub_scale": best}
