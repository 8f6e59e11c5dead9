"""Weighted search of scales for grids with super-blocks: sub-scale codes, sub-minimum codes and super-scales together.

Each sub-block gets its best real-valued scale first (`scale_search`). Then, from several super-scales, three things
alternate: round the sub-scales, refit each sub-block by least squares, refit the super-scales by least squares. At last
every sub-scale and sub-minimum code tries its neighbours. All errors are of the stored fields, and the best of each
super-block is kept. llama.cpp's `make_qkx3_quants` and `make_qp_quants` round sub-scales once, without looking back.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from signround_edge.formats.grid import BlockScales, Fields, Grid, safe_reciprocal, zero_position
from signround_edge.formats.scale_search import (
    in_row_chunks,
    refit_affine,
    refit_symmetric,
    search_affine,
    search_symmetric,
    weighted_error,
)

if TYPE_CHECKING:
    from signround_edge.formats.super_block import SuperBlockGrid

# Super-scales relative to the one that just reaches the largest sub-scale: smaller ones resolve the others better.
SUPER_FACTORS = (1.0, 0.93, 0.86, 0.8)
ROUNDS = 3


class _FreeScales(Grid):
    """The codes and levels of a grid with real-valued scales, as if nothing had to be stored."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self.block_size, self.affine, self.anchor = grid.block_size, grid.affine, grid.anchor
        self.code_min, self.code_max = grid.code_min, grid.code_max
        self.minimum_at_most_zero = grid.minimum_at_most_zero

    def store(self, scales: BlockScales) -> Fields:
        return {"scale": scales.scale} if scales.minimum is None else {"scale": scales.scale, "min": scales.minimum}

    def affine_view(self, fields: Fields) -> tuple[Tensor, Tensor]:
        scale = fields["scale"]
        if not self.affine:
            return scale, torch.full_like(scale, self.anchor)
        return scale, zero_position(scale, fields["min"])

    def levels(self, offsets: Tensor) -> Tensor:
        return self.grid.levels(offsets)

    def nearest_levels(self, levels: Tensor) -> Tensor:
        return self.grid.nearest_levels(levels)

    def from_levels(self, levels: Tensor, fields: Fields) -> Tensor:
        weights = levels * fields["scale"].unsqueeze(-1)
        return weights.add_(fields["min"].unsqueeze(-1)) if self.affine else weights

    def search(self, blocks: Tensor, importance: Tensor) -> BlockScales:
        return (search_affine if self.affine else search_symmetric)(self, blocks, importance)

    def field_shapes(self, rows: int, cols: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        raise NotImplementedError("these fields are never stored")


def search_super(grid: SuperBlockGrid, blocks: Tensor, importance: Tensor) -> BlockScales:
    """Best stored scales of each super-block. Shapes as in `Grid.search`."""
    return in_row_chunks(lambda w, h: _search(grid, w, h), blocks, importance)


def _search(grid: SuperBlockGrid, blocks: Tensor, importance: Tensor) -> BlockScales:
    free = _FreeScales(grid)
    start = free.search(blocks, importance)
    refit = refit_affine(grid, blocks, importance) if grid.affine else refit_symmetric(blocks, importance)
    best = grid.store(start)
    best_error = grid.per_super(weighted_error(grid, blocks, importance, best)).sum(-1)
    derived = grid.scales_of(best)
    for factor in SUPER_FACTORS:
        supers = (None if s is None else s * factor for s in (derived.super_scale, derived.super_minimum))
        scales = BlockScales(start.scale, start.minimum, *supers)
        for _ in range(ROUNDS):
            fields = grid.store(scales)
            levels = grid.round_levels(blocks, fields)
            error = grid.per_super(weighted_error(grid, blocks, importance, fields, levels)).sum(-1)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best = {name: choose(better, fields[name], best[name]) for name in best}
            fitted = refit(levels)
            scales = BlockScales(fitted.scale, fitted.minimum, *refit_supers(grid, blocks, importance, levels, fields))
    return grid.scales_of(_try_neighbours(grid, blocks, importance, best))


def choose(better: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """A field of the super-blocks that are better, whether it has one value a super-block or one a sub-block."""
    if new.shape != better.shape:
        better = better.repeat_interleave(new.shape[-1] // better.shape[-1], dim=-1)
    return torch.where(better, new, old)


def refit_supers(
    grid: SuperBlockGrid, blocks: Tensor, importance: Tensor, levels: Tensor, fields: Fields
) -> tuple[Tensor, Tensor | None]:
    """Least squares of w on d·a − e·b over each super-block, with a = sc·level, b = mn: (d, e), f32 [R, supers]."""

    def total(values: Tensor) -> Tensor:
        return grid.per_super(values.sum(-1)).sum(-1)

    a = levels * grid.sub_multiples(fields).unsqueeze(-1)
    aa, aw = total(importance * a * a), total(importance * a * blocks)
    if "sub_minimum" not in fields:
        return aw * safe_reciprocal(aa), None
    b = fields["sub_minimum"].float().unsqueeze(-1).expand_as(blocks)
    bb, ab, bw = (total(importance * b * other) for other in (b, a, blocks))
    inverse = safe_reciprocal(aa * bb - ab * ab)
    d, e = (aw * bb - ab * bw) * inverse, (ab * aw - aa * bw) * inverse
    sound = (d > 0) & (e > 0)  # otherwise fall back to what is stored
    return (
        torch.where(sound, d, fields["super_scale"].float()),
        torch.where(sound, e, fields["super_minimum"].float()),
    )


def _try_neighbours(grid: SuperBlockGrid, blocks: Tensor, importance: Tensor, fields: Fields) -> Fields:
    """Each sub-block takes the neighbouring sub-scale and sub-minimum codes where they err less."""
    names = [name for name in ("sub_scale", "sub_minimum") if name in fields]
    for _ in range(2):
        best_error = weighted_error(grid, blocks, importance, fields)
        centre = fields
        for moves in itertools.product((-1, 0, 1), repeat=len(names)):
            if not any(moves):
                continue
            moved = dict(fields)
            for name, move in zip(names, moves, strict=True):
                low, high = grid.field_ranges[name]
                moved[name] = (centre[name].to(torch.int16) + move).clamp(low, high).to(centre[name].dtype)
            error = weighted_error(grid, blocks, importance, moved)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            fields = {k: torch.where(better, moved[k], v) if k in names else v for k, v in fields.items()}
    return fields
