"""Weighted search of scales for vector grids, where rounding is what costs time.

Candidates of each sub-block are rounded once; with the levels found, the best real-valued scale and its error are
known:

    s* = Σ h·w·l / Σ h·l²        Σ h·(w − s*·l)² = Σ h·w² − (Σ h·w·l)² / Σ h·l²

Then super-scales and sub-scales are refitted in turn as for other grids with super-blocks (`super_search`), and each
sub-scale code tries its neighbours. All errors are of the stored fields.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from signround_edge.formats.grid import BlockScales, Fields, safe_reciprocal
from signround_edge.formats.scale_search import in_row_chunks, weighted_error
from signround_edge.formats.super_search import choose, refit_supers

if TYPE_CHECKING:
    from signround_edge.formats.ggml_vectors import VectorGrid

SUPER_FACTORS = (1.0, 0.9)
ROUNDS = 2


def search_vectors(grid: VectorGrid, blocks: Tensor, importance: Tensor) -> BlockScales:
    """Best stored scales of each super-block. Shapes as in `Grid.search`."""
    return in_row_chunks(lambda w, h: _search(grid, w, h), blocks, importance)


def _search(grid: VectorGrid, blocks: Tensor, importance: Tensor) -> BlockScales:
    scale, shift = _free_scales(grid, blocks, importance)
    best = grid.store(BlockScales(scale, shift))
    derived = grid.scales_of(best).super_scale
    assert derived is not None
    best_error = torch.full(derived.shape, torch.inf, device=blocks.device)
    for factor in SUPER_FACTORS:
        scales = BlockScales(scale, shift, derived * factor)
        for _ in range(ROUNDS):
            fields = grid.store(scales)
            levels = grid.round_levels(blocks, fields)
            error = grid.per_super(weighted_error(grid, blocks, importance, fields, levels)).sum(-1)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best = {name: choose(better, fields[name], best[name]) for name in best}
            if shift is not None:
                levels += shift.unsqueeze(-1)
            fitted, _ = _fit(blocks, importance, levels)
            scales = BlockScales(fitted, shift, refit_supers(grid, blocks, importance, levels, fields)[0])
    return grid.scales_of(_try_neighbours(grid, blocks, importance, best))


def _free_scales(grid: VectorGrid, blocks: Tensor, importance: Tensor) -> tuple[Tensor, Tensor | None]:
    """The best real-valued scale of each sub-block, f32 [R, B], and what its levels are shifted by, where they are."""
    extreme = blocks.abs().amax(dim=-1) / grid.table[-1]
    best, shift = extreme, torch.zeros_like(extreme)
    most = torch.full_like(extreme, -torch.inf)
    for factor, by in itertools.product(grid.factors, grid.choices_of_shift):
        inverse = safe_reciprocal(extreme * factor).unsqueeze(-1)
        levels = grid.nearest_levels(blocks * inverse - by).add_(by)
        fitted, gain = _fit(blocks, importance, levels)
        better = gain > most
        best, most = torch.where(better, fitted, best), torch.where(better, gain, most)
        shift = torch.where(better, by, shift)
    return best, None if grid.choices_of_shift == (0.0,) else shift


def _fit(blocks: Tensor, importance: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """(s*, by how much it lowers the error below that of zeros), f32 [R, B]; s* is not negative."""
    weighted = importance * levels
    products = (weighted * blocks).sum(-1).clamp_(min=0)
    scale = products * safe_reciprocal((weighted * levels).sum(-1))
    return scale, products * scale


def _try_neighbours(grid: VectorGrid, blocks: Tensor, importance: Tensor, fields: Fields) -> Fields:
    """Each sub-block takes the neighbouring sub-scale code where it errs less."""

    def error_with(fields: Fields) -> Tensor:
        errors = weighted_error(grid, blocks, importance, fields)
        return errors.view(*fields["sub_scale"].shape, -1).sum(-1)

    best, least = fields["sub_scale"], error_with(fields)
    for move in (-1, 1):
        moved = (fields["sub_scale"].to(torch.int16) + move).clamp_(0, grid.sub_max).to(torch.uint8)
        error = error_with({**fields, "sub_scale": moved})
        best, least = torch.where(error < least, moved, best), torch.minimum(error, least)
    return {**fields, "sub_scale": best}
