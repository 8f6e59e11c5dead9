"""Grids of llama.cpp's single-scale block types: Q2_0, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, TQ1_0, TQ2_0.

Source of the arithmetic: `dequantize_row_q4_0` and its siblings in ggml-quants.c.
"""

from __future__ import annotations

import torch
from torch import Tensor

from signround_edge.formats.grid import BlockScales, Fields, Grid, to_fp16, zero_position
from signround_edge.formats.scale_search import in_row_chunks, search_affine, search_symmetric


class SymmetricFp16(Grid):
    """w = d·(q − anchor), one fp16 d per block (Q2_0, Q4_0, Q5_0, Q8_0, TQ1_0, TQ2_0). Field: scale fp16 [R, B].

    The anchor is the middle code, 2^(bits−1), unless given; signed codes have theirs at 0. A code is stored in
    `container` bits: as many as it has, unless given. There are `codes` of them, 2^bits unless given.
    """

    affine = False

    def __init__(
        self,
        name: str,
        bits: int,
        block_size: int = 32,
        signed: bool = False,
        anchor: int | None = None,
        container: float | None = None,
        codes: int | None = None,
    ) -> None:
        half = 1 << (bits - 1)
        self.name = name
        self.block_size = self.row_multiple = block_size
        self.code_min = -half if signed else 0
        self.code_max = self.code_min + (codes or 2 * half) - 1
        self.anchor = self.code_min + half if anchor is None else anchor
        self.code_dtype = torch.int8 if signed else torch.uint8
        self.bits_per_weight = (container or bits) + 16 / block_size

    def store(self, scales: BlockScales) -> Fields:
        return {"scale": to_fp16(scales.scale)}

    def affine_view(self, fields: Fields) -> tuple[Tensor, Tensor]:
        scale = fields["scale"].float()
        return scale, torch.full_like(scale, self.anchor)

    def from_levels(self, levels: Tensor, fields: Fields) -> Tensor:
        return levels * fields["scale"].float().unsqueeze(-1)

    def search(self, blocks: Tensor, importance: Tensor) -> BlockScales:
        return in_row_chunks(lambda w, h: search_symmetric(self, w, h), blocks, importance)

    def field_shapes(self, rows: int, cols: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {"scale": ((rows, cols // self.block_size), torch.float16)}


class AffineFp16(Grid):
    """w = d·q + m, fp16 d and m per block (Q4_1, Q5_1). Fields: scale, minimum fp16 [R, B]."""

    affine = True
    anchor = 0
    code_min = 0

    def __init__(self, name: str, bits: int, block_size: int = 32) -> None:
        self.name = name
        self.block_size = self.row_multiple = block_size
        self.code_max = (1 << bits) - 1
        self.bits_per_weight = bits + 32 / block_size

    def store(self, scales: BlockScales) -> Fields:
        assert scales.minimum is not None
        return {"scale": to_fp16(scales.scale), "minimum": to_fp16(scales.minimum)}

    def affine_view(self, fields: Fields) -> tuple[Tensor, Tensor]:
        scale = fields["scale"].float()
        return scale, zero_position(scale, fields["minimum"].float())

    def from_levels(self, levels: Tensor, fields: Fields) -> Tensor:
        # d has 11 significant bits and q at most 5, so d·q is exact in f32 and fused multiply-add changes nothing.
        weights = levels * fields["scale"].float().unsqueeze(-1)
        return weights.add_(fields["minimum"].float().unsqueeze(-1))

    def search(self, blocks: Tensor, importance: Tensor) -> BlockScales:
        return in_row_chunks(lambda w, h: search_affine(self, w, h), blocks, importance)

    def field_shapes(self, rows: int, cols: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        shape = (rows, cols // self.block_size)
        return {"scale": (shape, torch.float16), "minimum": (shape, torch.float16)}
