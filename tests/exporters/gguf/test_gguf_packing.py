"""Packed blocks mean to ggml exactly what the grid means by its codes, and nothing is lost on the way back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from adversarial import random_fields
from gguf import GGMLQuantizationType, quants
from hypothesis import given, settings
from hypothesis import strategies as st

from exporters.gguf.blocks.packing import LAYOUTS, pack, require_layout, unpack
from signround_edge.errors import UserError
from signround_edge.formats import QuantizedTensor, get_grid

ROWS = 3
# Several bytes mean the same: other numbers in base 3 with the same digits, minus zero.
TWO_SPELLINGS = ("TQ1_0", "MXFP4", "NVFP4")
KNOWN_TO_GGUF_PY = [name for name in LAYOUTS if hasattr(quants, name)]  # libggml knows all


def random_tensor(grid_name: str, units: int, seed: int, rows: int = ROWS) -> QuantizedTensor:
    """Any bit pattern that the grid can hold."""
    cols = units * get_grid(grid_name).row_multiple
    return random_fields(grid_name, rows, cols, torch.Generator().manual_seed(seed))


def adversarial_weights(cols: int) -> dict[str, torch.Tensor]:
    noise = torch.randn(ROWS, cols, generator=torch.Generator().manual_seed(7))
    outlier = noise * 0.01
    outlier[:, 5] = 1000.0
    return {
        "zeros": torch.zeros(ROWS, cols),
        "constant": torch.full((ROWS, cols), -0.37),
        "outlier": outlier,
        "subnormal": noise * 1e-41,
        "fp16_subnormal": noise * 3e-7,
        "fp16_max": torch.where(noise > 0, 65504.0, -65504.0),
        "one_sided": noise.abs() + 3,
        "normal": noise,
    }


def assert_ggml_agrees(tensor: QuantizedTensor) -> None:
    packed = pack(tensor)
    layout = LAYOUTS[tensor.grid.name]
    ours = tensor.dequantize().numpy()
    theirs = quants.dequantize(packed, GGMLQuantizationType(layout.ggml_type.number))
    assert packed.shape == (tensor.shape[0], tensor.grid.stored_bytes(1, tensor.shape[1]))
    assert np.array_equal(ours.view(np.uint32), theirs.view(np.uint32))


KINDS = tuple(adversarial_weights(32))


# One matrix of all kinds, whose rows have nothing to do with each other; each kind by itself is a full test.
@pytest.mark.parametrize("grid_name", KNOWN_TO_GGUF_PY)
@pytest.mark.parametrize(
    ("kinds", "units"),
    [(KINDS, 3), *[pytest.param((kind,), units, marks=pytest.mark.full) for kind in KINDS for units in (1, 3)]],
    ids=["all-3", *[f"{kind}-{units}" for kind in KINDS for units in (1, 3)]],
)
def test_ggml_dequantizes_packed_blocks_to_the_grids_weights(
    grid_name: str, kinds: tuple[str, ...], units: int
) -> None:
    grid = get_grid(grid_name)
    weights = adversarial_weights(units * grid.row_multiple)
    weight = torch.cat([weights[kind] for kind in kinds])
    tensor = grid.quantize(weight, grid.search(grid.blocked(weight), torch.ones(1)))
    assert tensor.problem() is None
    assert_ggml_agrees(tensor)


@pytest.mark.parametrize("grid_name", LAYOUTS)
@given(units=st.integers(1, 5), seed=st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_packing_loses_nothing(grid_name: str, units: int, seed: int) -> None:
    tensor = random_tensor(grid_name, units, seed)
    again = unpack(grid_name, pack(tensor))
    assert torch.equal(again.codes, tensor.codes)
    assert again.codes.dtype == tensor.codes.dtype
    assert set(again.fields) == set(tensor.fields)
    for name, value in tensor.fields.items():
        raw = torch.int16 if value.dtype == torch.float16 else value.dtype
        assert torch.equal(again.fields[name].view(raw), value.view(raw))
    assert again.problem() is None


@pytest.mark.parametrize("grid_name", KNOWN_TO_GGUF_PY)
@given(seed=st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_ggml_agrees_on_every_bit_pattern(grid_name: str, seed: int) -> None:
    assert_ggml_agrees(random_tensor(grid_name, 2, seed))


@pytest.mark.parametrize("grid_name", LAYOUTS)
def test_unpacking_arbitrary_bytes_and_packing_restores_them(grid_name: str) -> None:
    layout = LAYOUTS[grid_name]
    data = np.random.default_rng(3).integers(0, 256, (4, 5 * layout.unit_bytes), dtype=np.uint8)
    again = pack(unpack(grid_name, data))
    if grid_name in TWO_SPELLINGS:
        assert np.array_equal(*(dequantized_by_gguf_py(grid_name, d) for d in (again, data)))
        data = again
    assert np.array_equal(pack(unpack(grid_name, data)), data)


def dequantized_by_gguf_py(grid_name: str, data: np.ndarray) -> np.ndarray:
    values = quants.dequantize(data, GGMLQuantizationType[grid_name])
    return np.nan_to_num(values, nan=7.0) + 0.0  # minus zero is zero


@pytest.mark.parametrize("grid_name", LAYOUTS)
def test_packing_reads_rows_wherever_they_lie_in_memory(grid_name: str) -> None:
    """Some rows of a matrix, and tensors of a file that start at any byte."""
    tensor = random_tensor(grid_name, 3, seed=2, rows=5)
    assert np.array_equal(pack(tensor.take_rows(slice(1, 4))), pack(tensor)[1:4])
    assert np.array_equal(pack(tensor.take_rows(slice(0, 5, 2))), pack(tensor)[::2])
    room = torch.zeros(tensor.codes.numel() + 1, dtype=tensor.codes.dtype)
    room[1:] = tensor.codes.reshape(-1)
    moved = QuantizedTensor(tensor.grid, room[1:].reshape(tensor.codes.shape), tensor.fields)
    assert np.array_equal(pack(moved), pack(tensor))


def test_packed_rows_permute_like_the_matrix() -> None:
    tensor = random_tensor("Q4_0", 2, seed=1, rows=8)
    order = torch.tensor([3, 1, 0, 2, 7, 6, 5, 4])
    permuted = QuantizedTensor(tensor.grid, tensor.codes[order], {k: v[order] for k, v in tensor.fields.items()})
    assert np.array_equal(pack(permuted), pack(tensor)[order.numpy()])


@pytest.mark.parametrize("name", ["w4g32", "w8g32"])
def test_onnx_names_of_block_32_are_ggml_types(name: str) -> None:
    require_layout(get_grid(name).name, "x")


def test_a_grid_that_gguf_lacks_is_refused_with_the_way_out() -> None:
    with pytest.raises(UserError, match=r"model\.x .*w4g128-asym.*GGUF.*Q4_0.*--dtype f16"):
        require_layout("w4g128-asym", "model.x")
