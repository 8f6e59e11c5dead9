"""Grids of llama.cpp's IQ4 types: codes index a fixed table of 16 unevenly spaced levels.

Source of the table and the arithmetic: `kvalues_iq4nl`, `dequantize_row_iq4_nl` and `dequantize_row_iq4_xs` in ggml.
V moves a weight between its two neighbouring table entries, because `offsets` is linear between them.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from signround_edge.formats.ggml_k_quants import SuperSymmetric
from signround_edge.formats.ggml_legacy import SymmetricFp16
from signround_edge.formats.grid import Grid

TABLE = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@functools.cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(levels f32 [16], distance to the next level f32 [15], last code at or below each integer level int64 [241])."""
    table = torch.tensor(TABLE, dtype=torch.float32, device=device)
    integers = torch.arange(TABLE[0], TABLE[-1] + 1, dtype=torch.float32, device=device)
    return table, table.diff(), torch.bucketize(integers, table[1:-1], right=True)


@functools.cache
def _nearest(device: torch.device) -> Tensor:
    """The nearest level of each interval [−127 + j/2, −127 + (j+1)/2), f32 [481].

    Levels are integers, so two of them are equally far only at a multiple of 1/2, where the upper one is taken.
    """
    table, _, _ = _tables(device)
    halves = torch.arange(2 * TABLE[0], 2 * TABLE[-1] + 1, dtype=torch.float32, device=device) / 2
    middles = (table[1:] + table[:-1]) / 2
    return _pick(table, torch.bucketize(halves, middles, right=True))


def _pick(table: Tensor, index: Tensor) -> Tensor:
    """table[index]; index_select is several times faster than indexing."""
    return table.index_select(0, index.flatten()).view(index.shape)


class Codebook(Grid):
    """Levels from the table; mixed into the grids that say how scales are stored."""

    even = False
    anchor: int  # of the grid that this is mixed into

    def levels(self, offsets: Tensor) -> Tensor:
        table, gaps, _ = _tables(offsets.device)
        position = offsets + self.anchor
        below = position.floor().clamp_(0, 14)
        index = below.long()
        return _pick(table, index).add_((position - below).mul_(_pick(gaps, index)))

    def offsets_of_levels(self, levels: Tensor) -> Tensor:
        table, gaps, last_code = _tables(levels.device)
        # The table holds integers, so the integer below a level has the same last code at or below it.
        below = _pick(last_code, levels.clamp(TABLE[0], TABLE[-1]).sub_(TABLE[0]).long())
        return (levels - _pick(table, below)).div_(_pick(gaps, below)).add_(below).sub_(self.anchor)

    def nearest_levels(self, levels: Tensor) -> Tensor:
        halves = levels.clamp_(TABLE[0], TABLE[-1]).sub_(TABLE[0]).mul_(2).long()
        return _pick(_nearest(levels.device), halves)


class CodebookFp16(Codebook, SymmetricFp16):
    """w = d·table[q], one fp16 d per block: IQ4_NL. Field: scale fp16 [R, B]."""


class SuperCodebook(Codebook, SuperSymmetric):
    """w = d·sc·table[q], 6-bit sc stored with an offset of 32: IQ4_XS. Fields as in `SuperSymmetric`."""
