"""Design section 2: what libggml's own dequantizer, and gguf-py's, make of a packed tensor is
`QuantizedTensor.dequantize()`, bit for bit, on every grid that GGUF can store."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from adversarial import random_fields
from gguf import GGMLQuantizationType, quants

from exporters.gguf.blocks.packing import LAYOUTS, pack, unpack
from runtime_tests.runtimes.llama_cpp import dequantize
from signround_edge.formats import QuantizedTensor, get_grid

ROWS, COLS = 48, 768  # an odd number of super-blocks a row
FP16_TINY, FP16_SMALLEST_NORMAL, FP16_MAX = 2.0**-24, 2.0**-14, 65504.0

# Several bytes mean the same: other numbers in base 3 with the same digits, minus zero.
TWO_SPELLINGS = ("TQ1_0", "MXFP4", "NVFP4")


def adversarial_weights(generator: torch.Generator) -> torch.Tensor:
    """Rows of [ROWS, COLS]: zeros, constants, one outlier, subnormals, ±fp16 max and beyond, signed zeros, noise."""
    w = torch.randn(ROWS, COLS, generator=generator)
    w[0] = 0.0
    w[1] = -0.0
    w[2], w[3] = 1.0, -3.25
    w[4] = 0.0
    w[4, 17] = 1e4
    w[5] = 1e-3 * w[5]
    w[5, -1] = -6e4
    w[6] = FP16_TINY * w[6]
    w[7] = FP16_SMALLEST_NORMAL * w[7]
    w[8], w[9] = FP16_MAX, -FP16_MAX
    w[10] = FP16_MAX * w[10].sign()
    w[11] = 1e30 * w[11]
    w[12] = 1e-42
    w[13] = w[13].abs() + 100
    return w


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_libggml_dequantizes_to_the_same_bits(name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    grid = get_grid(name)
    weights = adversarial_weights(generator)
    searched = grid.quantize(weights, grid.search(grid.blocked(weights), torch.ones(1)))
    assert_same_bits(name, [searched, *(random_fields(name, ROWS, COLS, generator) for _ in range(5))])


# Of each way of storing scales one by default.
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in ("Q4_0", "Q4_K", "IQ4_XS") else pytest.mark.full) for name in LAYOUTS],
)
def test_ten_million_weights_differ_nowhere(name: str) -> None:
    generator = torch.Generator().manual_seed(2)
    row_bytes = get_grid(name).stored_bytes(1, COLS)
    for _ in range(-(-10_000_000 // (ROWS * COLS * 40))):
        assert_same_bits(name, [random_fields(name, ROWS, COLS, generator) for _ in range(40)])
        data = torch.randint(256, (40 * ROWS, row_bytes), generator=generator, dtype=torch.uint8).numpy()
        again = pack(unpack(name, data))
        if name in TWO_SPELLINGS:
            data = again
        assert np.array_equal(pack(unpack(name, data)), data)


def assert_same_bits(name: str, tensors: list[QuantizedTensor]) -> None:
    """libggml's weights are ours, gguf-py's too where it knows the type, and unpacking gives back what was packed."""
    for tensor in tensors:
        assert tensor.problem() is None
        again = unpack(name, pack(tensor))
        assert torch.equal(again.codes, tensor.codes)
        assert all(
            torch.equal(again.fields[f].view(torch.uint8), v.view(torch.uint8)) for f, v in tensor.fields.items()
        )
    number = LAYOUTS[name].ggml_type.number
    data = np.concatenate([pack(tensor) for tensor in tensors])
    found = [dequantize(number, data.tobytes(), ROWS * len(tensors), COLS)]
    if hasattr(quants, name):
        found.append(quants.dequantize(data, GGMLQuantizationType(number)))
    expected = torch.cat([tensor.dequantize() for tensor in tensors]).numpy()
    for weights in found:
        assert np.count_nonzero(weights.view(np.uint32) != expected.view(np.uint32)) == 0
