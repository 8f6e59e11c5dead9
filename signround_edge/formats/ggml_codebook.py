"""Grids of llama.cpp whose codes index a fixed table of levels: IQ4_NL, IQ4_XS, MXFP4, NVFP4, Q1_0.

Source of the tables and the arithmetic: `kvalues_iq4nl`, `kvalues_mxfp4`, `dequantize_row_iq4_nl`, `…_iq4_xs`,
`…_mxfp4`, `…_nvfp4` and `…_q1_0` in ggml. V moves a weight between its two neighbouring table entries, because
`offsets` is linear between them.
"""

from __future__ import annotations

import functools
from abc import abstractmethod

import torch
from torch import Tensor

from signround_edge.formats.ggml_k_quants import SuperSymmetric
from signround_edge.formats.ggml_legacy import SymmetricFp16
from signround_edge.formats.grid import BlockScales, Fields, Grid
from signround_edge.formats.scale_search import in_row_chunks, search_symmetric

Table = tuple[int, ...]

IQ4_TABLE = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
# e2m1, twice its values, in their order; ggml's nibbles 8 to 15 are the negative ones, and 8 is another zero.
E2M1_TABLE = (-12, -8, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6, 8, 12)
SIGN_TABLE = (-1, 1)


@functools.cache
def _tables(table: Table, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(levels f32 [n], distance to the next level f32 [n − 1], last code at or below each integer level int64)."""
    levels = torch.tensor(table, dtype=torch.float32, device=device)
    integers = torch.arange(table[0], table[-1] + 1, dtype=torch.float32, device=device)
    return levels, levels.diff(), torch.bucketize(integers, levels[1:-1], right=True)


@functools.cache
def _nearest(table: Table, device: torch.device) -> Tensor:
    """The nearest level of each interval [first + j/2, first + (j+1)/2), f32.

    Levels are integers, so two of them are equally far only at a multiple of 1/2, where the upper one is taken.
    """
    levels, _, _ = _tables(table, device)
    halves = torch.arange(2 * table[0], 2 * table[-1] + 1, dtype=torch.float32, device=device) / 2
    middles = (levels[1:] + levels[:-1]) / 2
    return _pick(levels, torch.bucketize(halves, middles, right=True))


def _pick(table: Tensor, index: Tensor) -> Tensor:
    """table[index]; index_select is several times faster than indexing."""
    return table.index_select(0, index.flatten()).view(index.shape)


class Codebook(Grid):
    """Levels from a table of integers; mixed into the grids that say how scales are stored.

    Attributes:
        table: level of each code, ascending. The anchor is the middle code.
    """

    even = False
    anchor: int  # of the grid that this is mixed into
    table: Table = IQ4_TABLE

    def levels(self, offsets: Tensor) -> Tensor:
        table, gaps, _ = _tables(self.table, offsets.device)
        position = offsets + self.anchor
        below = position.floor().clamp_(0, len(self.table) - 2)
        index = below.long()
        return _pick(table, index).add_((position - below).mul_(_pick(gaps, index)))

    def offsets_of_levels(self, levels: Tensor) -> Tensor:
        table, gaps, last_code = _tables(self.table, levels.device)
        # The table holds integers, so the integer below a level has the same last code at or below it.
        whole = levels.clamp(self.table[0], self.table[-1]).sub_(self.table[0]).long()
        below = _pick(last_code, whole)
        return (levels - _pick(table, below)).div_(_pick(gaps, below)).add_(below).sub_(self.anchor)

    def nearest_levels(self, levels: Tensor) -> Tensor:
        halves = levels.clamp_(self.table[0], self.table[-1]).sub_(self.table[0]).mul_(2).long()
        return _pick(_nearest(self.table, levels.device), halves)

    def level_rule(self, device: torch.device) -> tuple[int, int, Tensor | None]:
        return self.table[0], self.table[-1], _nearest(self.table, device)


class CodebookFp16(Codebook, SymmetricFp16):
    """w = d·table[q], one fp16 d per block: IQ4_NL, Q1_0. Field: scale fp16 [R, B]."""

    def __init__(self, name: str, table: Table, bits: int, block_size: int = 32) -> None:
        super().__init__(name, bits=bits, block_size=block_size)
        self.table = table


class SuperCodebook(Codebook, SuperSymmetric):
    """w = d·sc·table[q], 6-bit sc stored with an offset of 32: IQ4_XS. Fields as in `SuperSymmetric`."""


class SmallFloatScales(Codebook):
    """w = s·e2m1[q], with s a positive float of 8 bits per block: MXFP4, NVFP4. Field: scale_code uint8 [R, B].

    Subclasses say which float each byte stands for; a real-valued scale is stored as the nearest one.
    """

    affine = False
    fp16_scales = False
    positive_scales = True
    table = E2M1_TABLE
    code_min, code_max = 0, len(E2M1_TABLE) - 1
    anchor = len(E2M1_TABLE) // 2
    factors: tuple[float, ...] | None = None

    def __init__(self, name: str, block_size: int, row_multiple: int) -> None:
        self.name = name
        self.block_size, self.row_multiple = block_size, row_multiple
        self.bits_per_weight = 4 + 8 / block_size
        self.field_ranges = {"scale_code": (0, len(self.scales(torch.device("cpu"))) - 1)}

    @abstractmethod
    def scales(self, device: torch.device) -> Tensor:
        """The float of each byte that is in use, f32, ascending."""

    @abstractmethod
    def boundaries(self, scales: Tensor) -> Tensor:
        """From where on a real-valued scale is stored as the next of `scales`."""

    def store(self, scales: BlockScales) -> Fields:
        known = self.scales(scales.scale.device)
        codes = torch.bucketize(scales.scale.abs(), self.boundaries(known), out_int32=True)
        return {"scale_code": codes.to(torch.uint8)}

    def effective_scale(self, fields: Fields) -> Tensor:
        """s of every block, f32 [R, B]."""
        codes = fields["scale_code"]
        return _pick(self.scales(codes.device), codes.int())

    def affine_view(self, fields: Fields) -> tuple[Tensor, Tensor]:
        scale = self.effective_scale(fields)
        return scale, torch.full_like(scale, self.anchor)

    def from_levels(self, levels: Tensor, fields: Fields) -> Tensor:
        return levels * self.effective_scale(fields).unsqueeze(-1)

    def scales_at_their_limits(self, fields: Fields) -> tuple[Tensor, Tensor]:
        return self.effective_scale(fields) == 0, fields["scale_code"] == self.field_ranges["scale_code"][1]

    @property
    def scales_hold(self) -> str:
        known = self.scales(torch.device("cpu"))
        return f"{self.name}'s scales hold {float(known[known > 0][0]):.0e} to {float(known[-1]):.4g}"

    def search(self, blocks: Tensor, importance: Tensor) -> BlockScales:
        return in_row_chunks(lambda w, h: search_symmetric(self, w, h, self.factors), blocks, importance)

    def field_shapes(self, rows: int, cols: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {"scale_code": ((rows, cols // self.block_size), torch.uint8)}


class E8M0Scales(SmallFloatScales):
    """MXFP4: scales are powers of two, 2^(code − 128): half of e8m0, as the table is twice e2m1.

    The last three of e8m0's bytes are left out: with them the largest level overflows f32.
    """

    # Neighbouring powers of two around the one that just reaches the largest level.
    factors = (0.36, 0.72, 1.42, 1.0)

    def scales(self, device: torch.device) -> Tensor:
        return _e8m0_halves(device)

    def boundaries(self, scales: Tensor) -> Tensor:
        return scales[:-1] * 2**0.5


class E4M3Scales(SmallFloatScales):
    """NVFP4: scales are unsigned e4m3 floats, of which half is taken as the table is twice e2m1; 0x7F is NaN."""

    def scales(self, device: torch.device) -> Tensor:
        return _e4m3_halves(device)

    def boundaries(self, scales: Tensor) -> Tensor:
        return (scales[:-1] + scales[1:]) / 2


@functools.cache
def _e8m0_halves(device: torch.device) -> Tensor:
    """`ggml_e8m0_to_fp32_half` (ggml-impl.h) of bytes 0 to 252: f32 [253]; the first two are subnormal."""
    normal = torch.arange(1, 252, dtype=torch.int32) << 23
    return torch.cat([torch.tensor([0x00200000, 0x00400000], dtype=torch.int32), normal]).view(torch.float32).to(device)


@functools.cache
def _e4m3_halves(device: torch.device) -> Tensor:
    """`ggml_ue4m3_to_fp32` (ggml-impl.h) of bytes 0 to 126: f32 [127]."""
    codes = torch.arange(127)
    exponent, mantissa = codes >> 3, (codes & 7).double()
    subnormal, normal = mantissa * 2.0**-10, (1 + mantissa / 8) * torch.exp2(exponent.double() - 8)
    return torch.where(exponent == 0, subnormal, normal).float().to(device)
