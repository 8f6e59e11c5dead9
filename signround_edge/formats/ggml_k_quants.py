"""Grids of llama.cpp's K-quants: integer sub-scales (and sub-minimums) times fp16 super-scales over 256 values.

Source of the arithmetic: `dequantize_row_q2_K` to `dequantize_row_q6_K` in ggml-quants.c. All products there are exact
in f32 (11 significant bits of fp16, at most 8 of the sub-scale, at most 6 of the code), so their order does not matter.
"""

from __future__ import annotations

import torch
from torch import Tensor

from signround_edge.formats.grid import BlockScales, Fields, to_fp16, zero_position
from signround_edge.formats.super_block import SUPER_BLOCK, SuperBlockGrid, SuperScaledGrid
from signround_edge.formats.super_search import search_super


class SuperSymmetric(SuperScaledGrid):
    """w = d·sc·(q − anchor): Q3_K (6-bit sc, stored with an offset of 32) and Q6_K (8-bit sc).

    Fields: sub_scale int8 [R, B], super_scale fp16 [R, super-blocks].
    """

    sub_dtype = torch.int8

    def __init__(self, name: str, bits: int, block_size: int, sub_bits: int, bits_per_weight: float) -> None:
        super().__init__(name, bits, block_size, bits_per_weight)
        self.anchor = 1 << (bits - 1)
        self.sub_min, self.sub_max = -(1 << (sub_bits - 1)), (1 << (sub_bits - 1)) - 1
        self.field_ranges = {"sub_scale": (self.sub_min, self.sub_max)}

    def search(self, blocks: Tensor, importance: Tensor) -> BlockScales:
        return search_super(self, blocks, importance)

    def store(self, scales: BlockScales) -> Fields:
        super_scale = scales.super_scale
        if super_scale is None:
            grouped = self.per_super(scales.scale)
            extreme = grouped.gather(-1, grouped.abs().argmax(dim=-1, keepdim=True))
            super_scale = extreme.squeeze(-1) / self.sub_min
        stored = to_fp16(super_scale)
        sub = self._sub_codes(scales.scale, stored, self.sub_min, self.sub_max)
        return {"sub_scale": sub.to(torch.int8), "super_scale": stored}


class SuperAffine(SuperBlockGrid):
    """w = d·sc·q − dmin·mn with unsigned sc and mn: Q2_K (4 bits each), Q4_K and Q5_K (6 bits each).

    Fields: sub_scale, sub_minimum uint8 [R, B]; super_scale, super_minimum fp16 [R, super-blocks].
    """

    affine = True
    anchor = 0
    minimum_at_most_zero = True

    def __init__(self, name: str, bits: int, block_size: int, sub_bits: int, bits_per_weight: float) -> None:
        super().__init__(name, bits, block_size, bits_per_weight)
        self.sub_max = (1 << sub_bits) - 1
        self.field_ranges = {"sub_scale": (0, self.sub_max), "sub_minimum": (0, self.sub_max)}

    def search(self, blocks: Tensor, importance: Tensor) -> BlockScales:
        return search_super(self, blocks, importance)

    def store(self, scales: BlockScales) -> Fields:
        assert scales.minimum is not None
        fields = {}
        stored = (
            ("scale", scales.scale, scales.super_scale),
            ("minimum", -scales.minimum, scales.super_minimum),
        )
        for kind, values, super_scale in stored:
            if super_scale is None:
                super_scale = self.per_super(values).amax(dim=-1).clamp(min=0) / self.sub_max
            fields[f"super_{kind}"] = to_fp16(super_scale)
            sub = self._sub_codes(values, fields[f"super_{kind}"], 0, self.sub_max)
            fields[f"sub_{kind}"] = sub.to(torch.uint8)
        return fields

    def scales_of(self, fields: Fields) -> BlockScales:
        supers = fields["super_scale"].float(), fields["super_minimum"].float()
        return BlockScales(*self._effective(fields), *supers)

    def affine_view(self, fields: Fields) -> tuple[Tensor, Tensor]:
        scale, minimum = self._effective(fields)
        return scale, zero_position(scale, minimum)

    def from_levels(self, levels: Tensor, fields: Fields) -> Tensor:
        scale, minimum = self._effective(fields)
        return (levels * scale.unsqueeze(-1)).add_(minimum.unsqueeze(-1))

    def _effective(self, fields: Fields) -> tuple[Tensor, Tensor]:
        """(d·sc, −dmin·mn) of every sub-block, f32 [R, B]."""
        scale = fields["sub_scale"].float() * self.per_block(fields["super_scale"])
        minimum = fields["sub_minimum"].float() * self.per_block(fields["super_minimum"])
        return scale, minimum.neg_()

    def field_shapes(self, rows: int, cols: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        subs = ((rows, cols // self.block_size), torch.uint8)
        supers = ((rows, cols // SUPER_BLOCK), torch.float16)
        return {"sub_scale": subs, "sub_minimum": subs, "super_scale": supers, "super_minimum": supers}
