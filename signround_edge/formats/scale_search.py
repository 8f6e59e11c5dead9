"""Initial scales by weighted search: minimise Σ E[x²]·(w − ŵ)² per block over candidate scales.

The candidates follow llama.cpp's `make_qx_quants` and `make_qkx2_quants` (ggml-quants.c): rescaled extremes,
each refitted by weighted least squares. Unlike there, each candidate is judged on the fields as the grid will store
them (fp16 scales, integer zero points), and symmetric grids try both signs of the scale. Weights that lie on the grid
already stay exact, and all but a few blocks of a coarser one within it, but on grids with super-blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from signround_edge.formats.grid import BlockScales, Fields, Grid, safe_reciprocal
from signround_edge.formats.threads import over_chunks

# Values worked on at once: temporaries stay in the L2 cache, several times faster than whole matrices.
CHUNK_VALUES = 1 << 16

# Candidate scales relative to the one that maps the extreme value onto the end of the code range. See docs/LOG.md.
SYMMETRIC_FACTORS = tuple(0.70 + 0.04 * i for i in range(11))
AFFINE_FACTORS = tuple(0.60 + 0.05 * i for i in range(9))
FACTORS_OF_8_BITS = (*(1 - 0.0025 * i for i in range(7, -1, -1)), *(127 / code for code in (126, 125, 124, 123)))

# How often the best affine candidate is refitted once more.
REFITS = 2


def in_row_chunks(search: Callable[[Tensor, Tensor], BlockScales], blocks: Tensor, importance: Tensor) -> BlockScales:
    """Run `search` on groups of rows of blocks [R, B, S] and join the results."""
    rows_at_once = max(1, CHUNK_VALUES // max(1, blocks[0].numel()))
    if blocks.is_cuda:
        rows_at_once *= 256
    importance = importance.expand(blocks.shape)
    chunks = [slice(i, i + rows_at_once) for i in range(0, blocks.shape[0], rows_at_once)]
    return BlockScales.join(over_chunks(lambda rows: search(blocks[rows], importance[rows]), chunks, blocks.is_cuda))


def extreme_scales(grid: Grid, blocks: Tensor) -> BlockScales:
    """Scales from the extremes of each block alone, as the paper and llama.cpp's reference quantizers take them.

    Affine: the smallest value gets the first code, the largest the last. Symmetric: the value of largest magnitude gets
    the first code (`quantize_row_q4_0_ref` in ggml-quants.c), whatever its sign.
    """
    if grid.affine:
        low, high = _range(grid, blocks)
        return BlockScales((high - low) / (grid.code_max - grid.code_min), low)
    return BlockScales(_extremes(grid, blocks) / abs(_end_levels(grid)[0]) * (1 if grid.positive_scales else -1))


def _range(grid: Grid, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest value that the codes of each block should reach, [R, B]."""
    low, high = blocks.amin(dim=-1), blocks.amax(dim=-1)
    return low.clamp(max=0) if grid.minimum_at_most_zero else low, high


def _end_levels(grid: Grid) -> tuple[float, float]:
    """Levels of the first and the last code."""
    low, high = grid.levels(torch.tensor(grid.offset_range, dtype=torch.float32)).tolist()
    return low, high


def _extremes(grid: Grid, blocks: Tensor) -> Tensor:
    """The signed value of largest magnitude of each block [R, B]; its magnitude where scales have no sign."""
    if grid.positive_scales:
        return blocks.abs().amax(dim=-1)
    where = blocks.abs().argmax(dim=-1, keepdim=True)
    return blocks.gather(-1, where).squeeze(-1)


def search_symmetric(
    grid: Grid, blocks: Tensor, importance: Tensor, factors: tuple[float, ...] | None = None
) -> BlockScales:
    """Best scale per block for ŵ = s·(q − anchor); both signs of s are tried. Shapes as in `Grid.search`.

    Args:
        factors: candidate scales relative to the one that maps the extreme value onto the end of the levels.
    """
    extreme = _extremes(grid, blocks)
    low, high = _end_levels(grid)
    ends = (low, high) if -low != high else (high,)
    if factors is None:
        factors = FACTORS_OF_8_BITS if grid.code_max - grid.code_min == 255 else SYMMETRIC_FACTORS
    candidates = (BlockScales(extreme * (factor / end)) for end in ends for factor in factors)
    return _best(grid, blocks, importance, candidates, refit_symmetric(blocks, importance))[0]


def search_affine(grid: Grid, blocks: Tensor, importance: Tensor) -> BlockScales:
    """Best (scale, minimum) per block for ŵ = s·q + m. Shapes as in `Grid.search`."""
    low, high = _range(grid, blocks)
    width, steps = high - low, grid.code_max - grid.code_min

    def candidate(factor: float) -> BlockScales:
        scale = width * (factor / steps)
        if factor > 1:  # from the low end on, as the codes of a coarser grid would lie
            return BlockScales(scale, low)
        # Both ends are clipped alike: clipping one alone lowers this error, but raises the model's. See docs/LOG.md.
        return BlockScales(scale, _bounded(grid, low + (width - steps * scale) / 2))

    candidates = (candidate(factor) for factor in affine_factors(steps))
    refit = refit_affine(grid, blocks, importance)
    best, best_error = _best(grid, blocks, importance, candidates, refit)
    refitted = best
    for _ in range(REFITS):
        refitted = refit(grid.round_levels(blocks, grid.store(refitted)))
        error = weighted_error(grid, blocks, importance, grid.store(refitted))
        best, best_error = _where(error < best_error, refitted, best), torch.minimum(error, best_error)
    return best


def affine_factors(steps: int) -> tuple[float, ...]:
    """Candidates for codes of that many steps; above 1, a part of the codes spans the whole range.

    All numbers of codes from half of them on are tried: of a checkpoint on this grid each block is found again then.
    """
    if steps == 255:
        return FACTORS_OF_8_BITS
    return AFFINE_FACTORS + tuple(steps / used for used in range((steps + 1) // 2, steps))


def _best(
    grid: Grid,
    blocks: Tensor,
    importance: Tensor,
    candidates: Iterable[BlockScales],
    refit: Callable[[Tensor], BlockScales],
) -> tuple[BlockScales, Tensor]:
    """The candidate, or its least-squares refit, with the smallest weighted error of each block, and that error."""
    best: BlockScales | None = None
    best_error = torch.full(blocks.shape[:-1], torch.inf, device=blocks.device)
    for candidate in candidates:
        fields = grid.store(candidate)
        levels = grid.round_levels(blocks, fields)
        refitted = refit(levels)
        for scales, error in (
            (candidate, weighted_error(grid, blocks, importance, fields, levels)),
            (refitted, weighted_error(grid, blocks, importance, grid.store(refitted))),
        ):
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best = scales if best is None else _where(better, scales, best)
    assert best is not None
    return best, best_error


def weighted_error(
    grid: Grid, blocks: Tensor, importance: Tensor, fields: Fields, levels: Tensor | None = None
) -> Tensor:
    """Σ importance·(w − ŵ)² of each block, [R, B]; `levels` are `grid.round_levels(blocks, fields)`, if known."""
    levels = grid.round_levels(blocks, fields) if levels is None else levels
    return grid.from_levels(levels, fields).sub_(blocks).square_().mul_(importance).sum(dim=-1)


def _where(choose: Tensor, yes: BlockScales, no: BlockScales) -> BlockScales:
    minimum = None
    if yes.minimum is not None and no.minimum is not None:
        minimum = torch.where(choose, yes.minimum, no.minimum)
    return BlockScales(torch.where(choose, yes.scale, no.scale), minimum)


def _bounded(grid: Grid, minimum: Tensor) -> Tensor:
    return minimum.clamp(max=0) if grid.minimum_at_most_zero else minimum


def refit_symmetric(blocks: Tensor, importance: Tensor) -> Callable[[Tensor], BlockScales]:
    """s* = Σ h·w·l / Σ h·l², with l the level of the code and h the importance."""
    weighted = blocks * importance

    def refit(levels: Tensor) -> BlockScales:
        squares = (importance * levels).mul_(levels)
        return BlockScales((weighted * levels).sum(-1) * safe_reciprocal(squares.sum(-1)))

    return refit


def refit_affine(grid: Grid, blocks: Tensor, importance: Tensor) -> Callable[[Tensor], BlockScales]:
    """Weighted least squares of w on s·q + m; where all codes are equal, s = 0 and m = the weighted mean."""
    h = importance.sum(-1)
    hw = (importance * blocks).sum(-1)
    weighted = importance * blocks

    def refit(codes: Tensor) -> BlockScales:
        scaled = importance * codes
        hq = scaled.sum(-1)
        hqq = scaled.mul_(codes).sum(-1)
        hqw = (weighted * codes).sum(-1)
        scale = (h * hqw - hq * hw) * safe_reciprocal(h * hqq - hq * hq)
        minimum = (hw - scale * hq) * safe_reciprocal(h)
        if grid.minimum_at_most_zero:  # the constrained optimum has either this minimum or none
            scale = torch.where(minimum > 0, hqw * safe_reciprocal(hqq), scale)
            minimum = minimum.clamp(max=0)
        return BlockScales(scale, minimum)

    return refit
