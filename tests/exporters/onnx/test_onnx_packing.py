from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from exporters.onnx.packing import (
    OperandLayout,
    Operands,
    layout_of,
    pack_bits,
    pack_operands,
    stack_layouts,
    stack_rows,
    unpack_bits,
)
from runtime_tests.runtimes.onnx_weights import dequantize_operands
from signround_edge.formats import GRIDS, BlockScales, Grid, get_grid
from signround_edge.formats.grid import Fields, to_fp16
from signround_edge.formats.matmul_nbits import matmul_nbits_container
from tests.adversarial import ADVERSARIAL, adversarial_matrix, random_fields

PACKABLE = [name for name, grid in GRIDS.items() if matmul_nbits_container(grid) is not None]


@given(
    bits=st.sampled_from([2, 4, 8]),
    rows=st.integers(1, 5),
    columns=st.integers(1, 40),
    seed=st.integers(0, 2**32 - 1),
)
def test_unpacking_inverts_packing_and_rows_are_whole_bytes(bits: int, rows: int, columns: int, seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, 1 << bits, (rows, columns), dtype=np.uint8)
    packed = pack_bits(values, bits)
    assert packed.shape == (rows, -(-columns * bits // 8))
    assert np.array_equal(unpack_bits(packed, bits, columns), values)


def test_packing_puts_the_first_value_in_the_lowest_bits() -> None:
    assert pack_bits(np.array([[1, 2, 3]], dtype=np.uint8), 4).tolist() == [[0x21, 0x03]]
    assert pack_bits(np.array([[1, 2, 3, 0, 2]], dtype=np.uint8), 2).tolist() == [[0b00111001, 0b10]]


def test_only_grids_with_a_real_valued_minimum_or_a_table_have_no_container() -> None:
    tables = {name for name, grid in GRIDS.items() if not grid.even}
    assert {"IQ4_NL", "MXFP4", "Q1_0"} < tables
    assert {name for name in GRIDS if name not in PACKABLE} == {"Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K"} | tables
    assert matmul_nbits_container(get_grid("w4g32")) == (4, 32)
    assert matmul_nbits_container(get_grid("Q5_0")) == (8, 32)
    assert matmul_nbits_container(get_grid("Q6_K")) == (8, 16)


class OffCentre(Grid):
    """A format that the exporter has never heard of: w = d·(q − 5), 12 codes, one fp16 d for 48 values."""

    name, block_size, row_multiple, bits_per_weight = "off-centre", 48, 48, 4 + 16 / 48
    code_min, code_max, anchor, affine = 0, 11, 5, False

    def store(self, scales: BlockScales) -> Fields:
        return {"d": to_fp16(scales.scale)}

    def affine_view(self, fields: Fields) -> tuple[torch.Tensor, torch.Tensor]:
        return fields["d"].float(), torch.full_like(fields["d"].float(), self.anchor)

    def from_levels(self, levels: torch.Tensor, fields: Fields) -> torch.Tensor:
        return levels * fields["d"].float().unsqueeze(-1)

    def search(self, blocks: torch.Tensor, importance: torch.Tensor) -> BlockScales:
        return BlockScales(blocks.abs().amax(-1) / 5)

    def field_shapes(self, rows: int, cols: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {"d": ((rows, cols // self.block_size), torch.float16)}


def test_a_new_grid_has_its_form_by_what_it_says_of_itself() -> None:
    grid = OffCentre()
    weight = adversarial_matrix("random", 5, 96)
    tensor = grid.quantize(weight, grid.search(grid.blocked(weight), torch.ones(1)))
    operands = pack_operands(tensor, half_scales=True)
    assert operands is not None
    assert_laid_out(operands, layout_of(grid, 5, 96, half_scales=True))
    assert (operands.bits, operands.block_size, str(operands.scales.dtype)) == (4, 16, "float16")
    stored = {"weight": operands.weight, "scales": operands.scales.astype(np.float32)}
    stored["zero_points"] = operands.zero_points
    found = dequantize_operands("MatMulNBits", stored, {"bits": 4, "block_size": 16})
    assert np.array_equal(found, tensor.dequantize().numpy())

    class Uneven(OffCentre):
        even = False

    class WithMinimum(OffCentre):
        affine = True

    assert matmul_nbits_container(Uneven()) is matmul_nbits_container(WithMinimum()) is None


@pytest.mark.parametrize("name", PACKABLE)
def test_onnx_runtime_dequantizes_to_the_same_bits(name: str) -> None:
    grid = get_grid(name)
    rows, cols = 7, 3 * grid.row_multiple  # an odd number of blocks pads the zero points of every row
    matrices = [adversarial_matrix(kind, rows, cols) for kind in ADVERSARIAL]
    tensors = [grid.quantize(w, grid.search(grid.blocked(w), torch.ones(1))) for w in matrices]
    tensors += [random_fields(name, rows, cols, torch.Generator().manual_seed(seed)) for seed in range(3)]
    # One matrix of all of them: a session each would take its time.
    packed = [pack_operands(tensor) for tensor in tensors]
    operands = stack_rows([p for p in packed if p is not None])
    expected = torch.cat([tensor.dequantize() for tensor in tensors]).numpy()
    stored = {"weight": operands.weight, "scales": operands.scales, "zero_points": operands.zero_points}
    attributes = {"bits": operands.bits, "block_size": operands.block_size}
    multiplied = dequantize_operands("MatMulNBits", stored, attributes)
    assert np.array_equal(multiplied, expected)
    stored["weight"] = operands.weight.reshape(operands.weight.shape[0], -1)
    assert np.array_equal(dequantize_operands("GatherBlockQuantized", stored, attributes), expected)


def assert_laid_out(operands: Operands, layout: OperandLayout | None) -> None:
    assert layout is not None
    assert operands.shape == (layout.rows, layout.cols)
    assert (operands.bits, operands.block_size) == (layout.bits, layout.block_size)
    assert operands.weight.shape == layout.weight_shape
    assert operands.weight.reshape(layout.rows, -1).shape == layout.gathered_shape
    assert (operands.scales.shape, str(operands.scales.dtype)) == (layout.scales_shape, layout.scale_dtype)
    assert operands.zero_points.shape == layout.zero_points_shape


def laid_out_and_packed(name: str, rows: int, cols: int, half_scales: bool) -> tuple[OperandLayout, Operands]:
    tensor = random_fields(name, rows, cols, torch.Generator().manual_seed(0))
    layout, operands = layout_of(tensor.grid, rows, cols, half_scales), pack_operands(tensor, half_scales)
    assert layout is not None
    assert operands is not None
    return layout, operands


@pytest.mark.parametrize("half_scales", [False, True])
@pytest.mark.parametrize("name", PACKABLE)
def test_a_layout_is_that_of_the_packed_matrix(name: str, half_scales: bool) -> None:
    layout, operands = laid_out_and_packed(name, 7, 3 * get_grid(name).row_multiple, half_scales)
    assert_laid_out(operands, layout)


@pytest.mark.parametrize("other", ["Q6_K", "w8g16-asym"])  # the scales of Q6_K stay f32
def test_a_stacked_layout_is_that_of_the_stacked_matrices(other: str) -> None:
    parts = [laid_out_and_packed(name, rows, 512, True) for name, rows in (("w8g16", 2), (other, 3))]
    layouts, operands = zip(*parts, strict=True)
    assert_laid_out(stack_rows(list(operands)), stack_layouts(list(layouts)))


def test_long_rows_are_multiplied_in_pieces() -> None:
    grid = get_grid("w4g32")
    weight = adversarial_matrix("random", 3, 2080)  # more than one run's input features
    tensor = grid.quantize(weight, grid.search(grid.blocked(weight), torch.ones(1)))
    operands = pack_operands(tensor)
    assert operands is not None
    stored = {"weight": operands.weight, "scales": operands.scales, "zero_points": operands.zero_points}
    found = dequantize_operands("MatMulNBits", stored, {"bits": 4, "block_size": 32})
    assert np.array_equal(found, tensor.dequantize().numpy())
