"""Grids of llama.cpp's K-quants: integer sub-scales times an fp16 super-scale over 256 values.

Source of the arithmetic: `dequantize_row_q6_K` in ggml-quants.c and `quantize_row_q6_K_ref` for the storage of scales.
"""

from __future__ import annotations

import torch
from torch import Tensor

from signround_edge.formats.grid import BlockScales, Fields, Grid, safe_reciprocal, to_fp16
from signround_edge.formats.scale_search import in_row_chunks, search_symmetric

SUPER_BLOCK = 256


class Q6K(Grid):
    """w = d·sc·(q − 32): int8 sc per 16 values, fp16 d per 256.

    Fields: sub_scale int8 [R, B], super_scale fp16 [R, B/16].
    """

    name = "Q6_K"
    block_size = 16
    row_multiple = SUPER_BLOCK
    code_min, code_max, anchor = 0, 63, 32
    affine = False
    bits_per_weight = 6.5625
    blocks_per_super = SUPER_BLOCK // 16

    def store(self, scales: BlockScales) -> Fields:
        grouped = scales.scale.reshape(scales.scale.shape[0], -1, self.blocks_per_super)
        where = grouped.abs().argmax(dim=-1, keepdim=True)
        extreme = grouped.gather(-1, where)
        super_scale = to_fp16(extreme / -128)
        sub = grouped * safe_reciprocal(super_scale.float())
        sub_scale = sub.round().clamp(-128, 127).flatten(-2).to(torch.int8)
        return {"sub_scale": sub_scale, "super_scale": super_scale.squeeze(-1)}

    def affine_view(self, fields: Fields) -> tuple[Tensor, Tensor]:
        scale = self._effective_scale(fields)
        return scale, torch.full_like(scale, self.anchor)

    def dequantize_blocks(self, codes: Tensor, fields: Fields) -> Tensor:
        return (codes.float() - self.anchor).mul_(self._effective_scale(fields).unsqueeze(-1))

    def search(self, blocks: Tensor, importance: Tensor) -> BlockScales:
        return in_row_chunks(lambda w, h: search_symmetric(self, w, h), blocks, importance)

    def field_shapes(self, rows: int, cols: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {
            "sub_scale": ((rows, cols // self.block_size), torch.int8),
            "super_scale": ((rows, cols // SUPER_BLOCK), torch.float16),
        }

    def _effective_scale(self, fields: Fields) -> Tensor:
        """d·sc, exact in f32: 11 and 8 significant bits."""
        super_scale = fields["super_scale"].float().repeat_interleave(self.blocks_per_super, dim=-1)
        return fields["sub_scale"].float() * super_scale
