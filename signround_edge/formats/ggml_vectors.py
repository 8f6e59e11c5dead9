"""Grids of llama.cpp's IQ2 and IQ3 types: vectors of a fixed table, and odd integer sub-scales.

Source of the arithmetic: `dequantize_row_iq2_xxs`, `…_iq2_xs`, `…_iq2_s`, `…_iq3_xxs` and `…_iq3_s` in ggml-quants.c. All
products there are exact in f32 (11 significant bits of fp16, 5 of the sub-scale, 6 of the level).

A code is a signed level of one value, as on other grids; which codes may stand beside one another is the table's matter.
Rounding goes to the nearest vector of the table, V moves the position that is rounded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from signround_edge.formats.ggml_codebook import Codebook
from signround_edge.formats.grid import BlockScales, Fields, safe_reciprocal, to_fp16
from signround_edge.formats.super_block import SUPER_BLOCK, SuperBlockGrid
from signround_edge.formats.vector_search import search_vectors
from signround_edge.formats.vector_table import VectorTable

_SUB_BITS = 4


class VectorGrid(Codebook, SuperBlockGrid):
    """w = d·unit·(2·sc + 1)·level, with 4-bit sc: IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS, IQ3_S.

    Levels are a table's magnitudes with signs, so a code is 0 for the largest negative one. Fields: sub_scale uint8 [R, B],
    super_scale fp16 [R, super-blocks].
    """

    affine = False
    positive_scales = True

    def __init__(self, name: str, even_signs: bool, block_size: int, unit: float, bits_per_weight: float) -> None:
        self.vectors = VectorTable(name, even_signs)
        magnitudes = self.vectors.magnitudes
        super().__init__(name, 1, block_size, bits_per_weight)
        self.table = (*(-m for m in reversed(magnitudes)), *magnitudes)
        self.code_max = len(self.table) - 1
        self.anchor = len(magnitudes)
        self.group = self.vectors.group
        self.unit = unit
        self.sub_max = (1 << _SUB_BITS) - 1
        self.field_ranges = {"sub_scale": (0, self.sub_max)}

    def nearest_offsets(self, positions: Tensor, weights: Tensor | None = None) -> Tensor:
        centred = positions.add_(0.5).reshape(-1, self.group)
        return self.vectors.nearest(centred, weights).sub_(0.5).view(positions.shape)

    def nearest_levels(self, levels: Tensor) -> Tensor:
        return self.levels(self.nearest_offsets(self.offsets_of_levels(levels)))

    def codes_problem(self, codes: Tensor) -> str | None:
        if (self.entry_numbers(codes) < 0).any():
            return f"codes are no vectors of {self.name}'s table"
        if self.vectors.even_signs and (codes.view(-1, 8) < self.anchor).sum(1).bitwise_and(1).any():
            return "an odd number of eight codes is negative"
        return None

    def entry_numbers(self, codes: Tensor) -> Tensor:
        """Number in the table of each group of codes uint8 [R, K]: int16 [R, K/size]; −1 where there is none."""
        signed = codes.to(torch.int16).sub_(self.anchor)
        magnitude = torch.where(signed < 0, -1 - signed, signed).view(len(codes), -1, self.vectors.size)
        places = self.anchor ** torch.arange(self.vectors.size, dtype=torch.int16, device=codes.device)
        numbers = self.vectors.numbers(codes.device)
        return numbers.index_select(0, (magnitude * places).sum(-1).flatten()).view(len(codes), -1)

    def search(self, blocks: Tensor, importance: Tensor) -> BlockScales:
        return search_vectors(self, blocks, importance)

    def store(self, scales: BlockScales) -> Fields:
        super_scale = scales.super_scale
        if super_scale is None:
            super_scale = self.per_super(scales.scale).amax(dim=-1) / (self.unit * (2 * self.sub_max + 1))
        stored = to_fp16(super_scale)
        multiples = scales.scale / self.unit * safe_reciprocal(self.per_block(stored))
        sub = multiples.sub_(1).div_(2).round_().clamp_(0, self.sub_max)
        return {"sub_scale": sub.to(torch.uint8), "super_scale": stored}

    def scales_of(self, fields: Fields) -> BlockScales:
        return BlockScales(self.effective_scale(fields), super_scale=fields["super_scale"].float())

    def sub_multiples(self, fields: Fields) -> Tensor:
        return fields["sub_scale"].float().mul_(2).add_(1).mul_(self.unit)

    def effective_scale(self, fields: Fields) -> Tensor:
        """d·unit·(2·sc + 1) of every sub-block, f32 [R, B]."""
        return self.sub_multiples(fields).mul_(self.per_block(fields["super_scale"]))

    def affine_view(self, fields: Fields) -> tuple[Tensor, Tensor]:
        scale = self.effective_scale(fields)
        return scale, torch.full_like(scale, self.anchor)

    def from_levels(self, levels: Tensor, fields: Fields) -> Tensor:
        return levels * self.effective_scale(fields).unsqueeze(-1)

    def field_shapes(self, rows: int, cols: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {
            "sub_scale": ((rows, cols // self.block_size), torch.uint8),
            "super_scale": ((rows, cols // SUPER_BLOCK), torch.float16),
        }
