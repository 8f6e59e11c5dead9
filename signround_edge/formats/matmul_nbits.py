"""Grids of ONNX Runtime's MatMulNBits with integer zero points, and the lossless view of other grids as one.

Source of the arithmetic: the MatMulNBits operator documentation (ONNX Runtime, ContribOperators.md):
w = s·(q − z), q and z unsigned integers of b bits, one s and z per block of g input features.

Symmetric grids need no class here: w4g32 *is* Q4_0 and w8g32 *is* Q8_0 with codes shifted by 128, so the table of
formats gives them one row, and one tuning run serves both files. Scales are fp16-valued on every grid, so the same run
exports to f32 and to f16 graphs without another rounding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from signround_edge.formats.ggml_legacy import SymmetricFp16
from signround_edge.formats.grid import BlockScales, Fields, Grid, QuantizedTensor, safe_reciprocal, to_fp16
from signround_edge.formats.scale_search import in_row_chunks, search_affine

ONNX_BITS = (2, 3, 4, 8)
ONNX_BLOCKS = (16, 32, 64, 128, 256)


class MatMulNBitsAsymmetric(Grid):
    """w = s·(q − z), fp16-valued s and b-bit integer z per block. Fields: scale fp16, zero_point uint8, [R, B].

    Codes and zero points of 3 bits are stored in 4: ONNX Runtime has no container of 3.
    """

    affine = True
    integer_zero = True
    anchor = 0
    code_min = 0

    def __init__(self, bits: int, block_size: int) -> None:
        self.name = f"w{bits}g{block_size}-asym"
        self.block_size = block_size
        self.row_multiple = math.lcm(block_size, ONNX_BLOCKS[0])
        self.code_max = (1 << bits) - 1
        self.field_ranges = {"zero_point": (0, self.code_max)}
        container = container_bits(self.code_max + 1)
        self.bits_per_weight = container + (16 + container) / block_size

    def store(self, scales: BlockScales) -> Fields:
        assert scales.minimum is not None
        scale = to_fp16(scales.scale)
        zero = (-scales.minimum * safe_reciprocal(scale.float())).round().clamp(0, self.code_max)
        return {"scale": scale, "zero_point": zero.to(torch.uint8)}

    def affine_view(self, fields: Fields) -> tuple[Tensor, Tensor]:
        return fields["scale"].float(), fields["zero_point"].float()

    def from_levels(self, levels: Tensor, fields: Fields) -> Tensor:
        shifted = levels - fields["zero_point"].float().unsqueeze(-1)
        return shifted.mul_(fields["scale"].float().unsqueeze(-1))

    def search(self, blocks: Tensor, importance: Tensor) -> BlockScales:
        return in_row_chunks(lambda w, h: search_affine(self, w, h), blocks, importance)

    def field_shapes(self, rows: int, cols: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        shape = (rows, cols // self.block_size)
        return {"scale": (shape, torch.float16), "zero_point": (shape, torch.uint8)}


def matmul_nbits_grid(bits: int, block_size: int, asymmetric: bool = False) -> Grid:
    """The grid of w<bits>g<block size>[-asym]; a symmetric one's zero point is 2^(bits−1).

    A block size that ONNX Runtime lacks is stored in smaller blocks that repeat its scale.
    """
    if asymmetric:
        return MatMulNBitsAsymmetric(bits, block_size)
    name, container = f"w{bits}g{block_size}", container_bits(1 << bits)
    grid = SymmetricFp16(name, bits=bits, block_size=block_size, signed=bits == 8, container=container)
    grid.row_multiple = math.lcm(block_size, ONNX_BLOCKS[0])
    return grid


@dataclass(frozen=True)
class NBitsView:
    """A quantized matrix as MatMulNBits stores it, before bit packing: w = scales·(codes − zero_points).

    Attributes:
        bits: bits of the container (2, 4 or 8).
        block_size: g, input features a block.
        codes: uint8 [N, K].
        scales: f32 [N, K/g]; fp16-valued but for Q3_K and Q6_K (sub-scale times fp16 super-scale).
        zero_points: uint8 [N, K/g].
    """

    bits: int
    block_size: int
    codes: Tensor
    scales: Tensor
    zero_points: Tensor


def has_matmul_nbits_form(grid: Grid) -> bool:
    """Whether tensors on the grid can be stored as MatMulNBits without loss: w = s·(q − z), z an integer."""
    return grid.even and (grid.integer_zero or not grid.affine)


def matmul_nbits_container(grid: Grid) -> tuple[int, int] | None:
    """(bits, block size) with which MatMulNBits stores tensors on the grid; None without a form.

    The block size is the largest of ONNX Runtime that divides the grid's.
    """
    if not has_matmul_nbits_form(grid):
        return None
    block_size = next(size for size in reversed(ONNX_BLOCKS) if grid.block_size % size == 0)
    return container_bits(grid.code_max - grid.code_min + 1), block_size


def container_bits(codes: int) -> int:
    """Bits in which ONNX Runtime stores one of so many codes: 2, 4 or 8; 3, 5 and 6 bits take the next larger."""
    return next(bits for bits in (2, 4, 8) if codes <= 1 << bits)


def matmul_nbits_bytes(grid: Grid, rows: int, cols: int) -> int | None:
    """Bytes of codes, f32 scales and packed zero points of a [rows, cols] matrix as MatMulNBits; None without a form.

    Each row of zero points is padded to a byte. ONNX Runtime takes scales in the dtype of the activations: f32.
    """
    container = matmul_nbits_container(grid)
    if container is None:
        return None
    bits, block_size = container
    blocks = cols // block_size
    return rows * (cols * bits // 8 + 4 * blocks + (blocks * bits + 7) // 8)


def as_matmul_nbits(tensor: QuantizedTensor) -> NBitsView | None:
    """The same integers and scales as MatMulNBits operands; None where the grid has no such form.

    Every grid of the form s·(q − integer) maps without loss; 5- and 6-bit codes take an 8-bit container.
    """
    grid, codes = tensor.grid, tensor.codes.view(torch.uint8)
    container = matmul_nbits_container(grid)
    if container is None:
        return None
    bits, block_size = container
    scales, zeros = grid.affine_view(tensor.fields)
    offset = -grid.code_min
    if offset:
        codes = codes + offset  # modulo 256, so that no wider copy is made
    zeros = (zeros + offset).to(torch.uint8)
    scales, zeros = (t.repeat_interleave(grid.block_size // block_size, dim=1) for t in (scales, zeros))
    return NBitsView(bits, block_size, codes, scales, zeros)
