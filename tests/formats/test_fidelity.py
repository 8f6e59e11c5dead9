"""Weights that lie on a grid are known as such, and so are those that fp16 scales cannot hold."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from signround_edge.formats import GRIDS, get_grid
from signround_edge.formats.fidelity import lies_on_grid, lost_weights
from signround_edge.formats.grid import QuantizedTensor

R, K = 16, 512
# Powers of two hold every weight, but those next to the limits of f32; NVFP4's scales end at both sides, too.
FP16_SCALES = [name for name in GRIDS if name != "MXFP4"]


def rounded(name: str, weight: Tensor) -> QuantizedTensor:
    grid = get_grid(name)
    return grid.quantize(
        weight, grid.search(grid.blocked(weight), torch.ones(1, K // grid.block_size, grid.block_size))
    )


def trained_on_q4_0(dtype: torch.dtype, positive: bool) -> tuple[Tensor, Tensor]:
    """(codes less 8, weights in `dtype`) of a checkpoint whose weights are code times scale."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (R, K // 32, 32), generator=generator)
    scale = (torch.rand(R, K // 32, 1, generator=generator) * 0.02 + 0.001).bfloat16().float()
    if not positive:
        scale = scale * torch.where(torch.rand(scale.shape, generator=generator) < 0.5, -1.0, 1.0)
    return codes.reshape(R, K), (codes * scale).reshape(R, K).to(dtype)


@pytest.mark.parametrize("positive", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["Q4_0", "w4g32"])
def test_weights_of_a_grid_get_the_codes_they_were_trained_with(name: str, dtype: torch.dtype, positive: bool) -> None:
    codes, weight = trained_on_q4_0(dtype, positive)
    stored = rounded(name, weight.float())
    assert lies_on_grid(weight.float(), stored)
    # a block may be stored under a scale of the other sign, where its codes have room for that
    found = (stored.codes.int() - stored.grid.anchor).reshape(-1, 32)
    trained = codes.reshape(-1, 32)
    assert bool(((found == trained).all(1) | (found == -trained).all(1)).all())
    assert lost_weights(weight.float(), stored) == (0, 0)


# In bf16, which has the fewest bits, they are nearest to lying on one.
@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, *[pytest.param(dtype, marks=pytest.mark.full) for dtype in (torch.float32, torch.float16)]],
    ids=str,
)
@pytest.mark.parametrize("name", GRIDS)
def test_other_weights_lie_on_no_grid_and_are_not_lost(name: str, dtype: torch.dtype) -> None:
    weight = (torch.randn(R, K, generator=torch.Generator().manual_seed(1)) * 0.05).to(dtype).float()
    stored = rounded(name, weight)
    assert not lies_on_grid(weight, stored)
    assert lost_weights(weight, stored) == (0, 0)


@pytest.mark.parametrize("name", FP16_SCALES)
def test_weights_too_small_for_an_fp16_scale_are_counted(name: str) -> None:
    weight = torch.randn(R, K, generator=torch.Generator().manual_seed(2)) * 0.05
    weight[:4] *= 1e-10
    weight[5, 7] = 0.0
    stored = rounded(name, weight)
    assert not stored.dequantize()[:4].any()
    assert lost_weights(weight, stored) == (int((weight[:4] != 0).sum()), 0)
    assert not lies_on_grid(weight, stored)


@pytest.mark.parametrize("name", FP16_SCALES)
def test_a_weight_too_large_for_an_fp16_scale_is_counted(name: str) -> None:
    weight = torch.randn(R, K, generator=torch.Generator().manual_seed(3)) * 0.05
    weight[3, 7], weight[9, 300] = 1e12, -1e12
    stored = rounded(name, weight)
    assert lost_weights(weight, stored) == (0, 2)
    assert float(stored.dequantize().abs().max()) < 1e12
