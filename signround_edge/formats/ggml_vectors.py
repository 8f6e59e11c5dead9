"""Grids of llama.cpp's IQ1, IQ2 and IQ3 types: vectors of a fixed table, and odd integer sub-scales.

Source of the arithmetic: `dequantize_row_iq2_xxs`, `…_iq2_xs`, `…_iq2_s`, `…_iq3_xxs`, `…_iq3_s`, `…_iq1_s` and
`…_iq1_m` in ggml-quants.c. All products there are exact in f32 (11 significant bits of fp16, 5 of the sub-scale, 6 of
the level).

A code is a signed level of one value, as on other grids; which codes may stand beside one another is the table's.
Rounding goes to the nearest vector of the table, V moves the position that is rounded.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from signround_edge.formats.ggml_codebook import Codebook
from signround_edge.formats.grid import BlockScales, Fields, safe_reciprocal, to_fp16
from signround_edge.formats.super_block import SuperScaledGrid
from signround_edge.formats.vector_search import search_vectors
from signround_edge.formats.vector_table import VectorTable

_DELTA = 0.125  # IQ1S_DELTA and IQ1M_DELTA


class VectorGrid(Codebook, SuperScaledGrid):
    """w = d·unit·(2·sc + 1)·level, with 4-bit sc: IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS, IQ3_S.

    Levels are a table's magnitudes with signs, so a code is 0 for the largest negative one. Fields: sub_scale uint8
    [R, B], super_scale fp16 [R, super-blocks].
    """

    positive_scales = True
    sub_dtype = torch.uint8
    # Candidate scales relative to the one that maps the largest magnitude of a block to the table's largest.
    factors: tuple[float, ...] = (0.6, 0.75, 0.9, 1.05)
    choices_of_shift: tuple[float, ...] = (0.0,)  # what is added to all levels of a block

    def __init__(
        self, name: str, even_signs: bool, block_size: int, unit: float, bits_per_weight: float, sub_bits: int = 4
    ) -> None:
        self.vectors = VectorTable(name, even_signs)
        magnitudes = self.vectors.magnitudes
        super().__init__(name, 1, block_size, bits_per_weight)
        self.table = magnitudes if self.vectors.signed else (*(-m for m in reversed(magnitudes)), *magnitudes)
        self.code_max = len(self.table) - 1
        self.anchor = len(self.table) // 2
        self._middle = 0.0 if self.vectors.signed else 0.5  # of the positions, above the anchor's
        self.group = self.vectors.group
        self.unit = unit
        self.sub_max = (1 << sub_bits) - 1
        self.field_ranges = {"sub_scale": (0, self.sub_max)}

    @property
    def codes_a_value(self) -> float:
        signs = 0.0 if self.vectors.signed else 7 / 8 if self.vectors.even_signs else 1.0
        return math.exp2(signs + math.log2(self.vectors.count) / self.vectors.size)

    def nearest_offsets(self, positions: Tensor, weights: Tensor | None = None) -> Tensor:
        centred = positions.add_(self._middle).reshape(-1, self.group)
        return self.vectors.nearest(centred, weights).sub_(self._middle).view(positions.shape)

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
        digits, base = codes.to(torch.int16), len(self.vectors.magnitudes)
        if not self.vectors.signed:
            digits = digits - self.anchor
            digits = torch.where(digits < 0, -1 - digits, digits)
        digits = digits.view(len(codes), -1, self.vectors.size)
        places = base ** torch.arange(self.vectors.size, dtype=torch.int16, device=codes.device)
        numbers = self.vectors.numbers(codes.device)
        return numbers.index_select(0, (digits * places).sum(-1).flatten()).view(len(codes), -1)

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

    def sub_multiples(self, fields: Fields) -> Tensor:
        return fields["sub_scale"].float().mul_(2).add_(1).mul_(self.unit)


class ShiftedVectorGrid(VectorGrid):
    """w = d·(2·sc + 1)·(level ± 1/8), with 3-bit sc and one sign of the eighth a block: IQ1_S, IQ1_M.

    IQ1_M's blocks are the 8 values that share that sign; two of them share a sub-scale. Fields as in `VectorGrid`, with
    sub_scale uint8 [R, B / `shared`], and sub_shift uint8 [R, B]: 1 where the eighth is subtracted. Real-valued scales
    carry the eighth as a minimum of ±scale/8.
    """

    factors = (0.45, 0.6, 0.75)
    choices_of_shift = (_DELTA, -_DELTA)

    def __init__(self, name: str, block_size: int, shared: int, bits_per_weight: float) -> None:
        super().__init__(name, False, block_size, unit=1, bits_per_weight=bits_per_weight, sub_bits=3)
        self.shared = shared
        self.field_ranges = {**self.field_ranges, "sub_shift": (0, 1)}

    def store(self, scales: BlockScales) -> Fields:
        shared = scales.scale.view(len(scales.scale), -1, self.shared).mean(-1).repeat_interleave(self.shared, dim=-1)
        fields = super().store(BlockScales(shared, super_scale=scales.super_scale))
        minimum = torch.zeros_like(shared) if scales.minimum is None else scales.minimum
        return {
            "sub_scale": fields["sub_scale"][:, :: self.shared].contiguous(),
            "sub_shift": (minimum < 0).to(torch.uint8),
            "super_scale": fields["super_scale"],
        }

    def scales_of(self, fields: Fields) -> BlockScales:
        scale = self.effective_scale(fields)
        return BlockScales(scale, scale * self.shifts(fields), fields["super_scale"].float())

    def sub_multiples(self, fields: Fields) -> Tensor:
        return super().sub_multiples(fields).repeat_interleave(self.shared, dim=-1)

    def shifts(self, fields: Fields) -> Tensor:
        """±1/8 of every block, f32 [R, B]."""
        return fields["sub_shift"].float().mul_(-2 * _DELTA).add_(_DELTA)

    def affine_view(self, fields: Fields) -> tuple[Tensor, Tensor]:
        return self.effective_scale(fields), self.anchor - self.shifts(fields)

    def from_levels(self, levels: Tensor, fields: Fields) -> Tensor:
        return (levels + self.shifts(fields).unsqueeze(-1)).mul_(self.effective_scale(fields).unsqueeze(-1))

    def _real_levels(self, blocks: Tensor, fields: Fields) -> Tensor:
        return super()._real_levels(blocks, fields).sub_(self.shifts(fields).unsqueeze(-1))

    def field_shapes(self, rows: int, cols: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        blocks = cols // self.block_size
        shapes = super().field_shapes(rows, cols)
        return {
            "sub_scale": ((rows, blocks // self.shared), torch.uint8),
            "sub_shift": ((rows, blocks), torch.uint8),
            "super_scale": shapes["super_scale"],
        }
