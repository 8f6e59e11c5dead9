"""What the grids of K-quants share: sub-blocks whose scales are integers times an fp16 super-scale."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from signround_edge.formats.grid import BlockScales, Fields, Grid, safe_reciprocal

SUPER_BLOCK = 256


class SuperBlockGrid(Grid):
    """What both kinds share: sub-blocks of `block_size` values, `blocks_per_super` of them in 256 values."""

    row_multiple = SUPER_BLOCK
    fp16_scales = False
    code_min = 0

    def __init__(self, name: str, bits: int, block_size: int, bits_per_weight: float) -> None:
        self.name = name
        self.block_size = block_size
        self.blocks_per_super = SUPER_BLOCK // block_size
        self.code_max = (1 << bits) - 1
        self.bits_per_weight = bits_per_weight

    def per_super(self, blocks: Tensor) -> Tensor:
        """[R, B] as [R, super-blocks, blocks_per_super]."""
        return blocks.reshape(blocks.shape[0], -1, self.blocks_per_super)

    def per_block(self, supers: Tensor) -> Tensor:
        """[R, super-blocks] repeated for every sub-block: f32 [R, B]."""
        return supers.float().repeat_interleave(self.blocks_per_super, dim=-1)

    @abstractmethod
    def scales_of(self, fields: Fields) -> BlockScales:
        """The scales that `store` turns into these very fields."""

    def sub_multiples(self, fields: Fields) -> Tensor:
        """How many super-scales the scale of every sub-block is, f32 [R, B]."""
        return fields["sub_scale"].float()

    def _sub_codes(self, values: Tensor, super_scale: Tensor, low: int, high: int) -> Tensor:
        """Real scales or minimums [R, B] as integer multiples of their fp16 super-scale [R, super-blocks]."""
        return (values * safe_reciprocal(self.per_block(super_scale))).round().clamp(low, high)


class SuperScaledGrid(SuperBlockGrid):
    """w = d·multiple·level, with no minimum: fields are sub_scale [R, B] and super_scale fp16 [R, super-blocks].

    Attributes:
        sub_dtype: of sub_scale.
    """

    affine = False
    sub_dtype: torch.dtype

    def scales_of(self, fields: Fields) -> BlockScales:
        return BlockScales(self.effective_scale(fields), super_scale=fields["super_scale"].float())

    def effective_scale(self, fields: Fields) -> Tensor:
        """d·multiple of every sub-block, f32 [R, B]."""
        return self.sub_multiples(fields) * self.per_block(fields["super_scale"])

    def affine_view(self, fields: Fields) -> tuple[Tensor, Tensor]:
        scale = self.effective_scale(fields)
        return scale, torch.full_like(scale, self.anchor)

    def from_levels(self, levels: Tensor, fields: Fields) -> Tensor:
        return levels * self.effective_scale(fields).unsqueeze(-1)

    def field_shapes(self, rows: int, cols: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {
            "sub_scale": ((rows, cols // self.block_size), self.sub_dtype),
            "super_scale": ((rows, cols // SUPER_BLOCK), torch.float16),
        }
