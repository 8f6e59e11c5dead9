"""The yardstick GPTQ: it is the paper's algorithm on our grids, and it beats plain rounding by its own measure."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from correlated_inputs import matrix_and_products, output_error
from support import make_run
from torch import Tensor

from benchmarks.gptq import Options, gptq, quantize
from signround_edge.formats import QuantizedTensor, get_grid
from signround_edge.model.tokenizer import load_tokenizer
from signround_edge.tuning.block.start import initial_scales
from signround_edge.tuning.calibration.text import calibration_tokens

GRIDS = ("Q4_0", "Q4_1", "w4g32-asym", "w4g128", "w2g64-asym", "w4g256", "Q4_K", "Q2_K", "IQ4_NL")
OPTIONS = (Options(act_order=True), Options(act_order=False), Options(act_order=False, scale_init="absmax"))


def rounded(weight: Tensor, hessian: Tensor, name: str, scale_init: str) -> QuantizedTensor:
    grid = get_grid(name)
    return grid.quantize(weight, initial_scales(grid, weight, hessian.diagonal(), scale_init))


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("options", OPTIONS, ids=["act-order", "in-order", "absmax"])
def test_identity_hessian_is_plain_rounding(name: str, options: Options) -> None:
    weight, _ = matrix_and_products()
    hessian = torch.eye(256)
    found, plain = gptq(weight, hessian, get_grid(name), options), rounded(weight, hessian, name, options.scale_init)
    assert torch.equal(found.codes, plain.codes)
    assert all(torch.equal(found.fields[field], plain.fields[field]) for field in plain.fields)


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("options", OPTIONS, ids=["act-order", "in-order", "absmax"])
def test_output_error_is_far_below_plain_rounding(name: str, options: Options) -> None:
    weight, hessian = matrix_and_products()
    found = gptq(weight, hessian, get_grid(name), options)
    assert found.problem() is None
    plain = rounded(weight, hessian, name, options.scale_init)
    assert output_error(weight, found.dequantize(), hessian) < 0.6 * output_error(weight, plain.dequantize(), hessian)


def test_each_column_solves_the_paper_s_equation() -> None:
    """By the optimal update of OBS (equation 2 of arXiv 2210.17323), column by column, with the inverse taken anew."""
    weight, hessian = matrix_and_products(rows=3, cols=32)
    grid = get_grid("Q4_0")
    found = gptq(weight, hessian, grid, Options(act_order=False, damping=0.01))
    damped = hessian.double() + 0.01 * hessian.diagonal().double().mean() * torch.eye(32, dtype=torch.float64)
    fields = grid.store(initial_scales(grid, weight, hessian.diagonal(), "search"))
    left, codes = weight.double().clone(), torch.empty(3, 32)
    for j in range(32):
        repeated = left[:, j].float().view(-1, 1, 1)
        offsets = grid.round_offsets(repeated, fields)
        codes[:, j] = offsets.flatten() + grid.anchor
        error = left[:, j] - grid.from_offsets(offsets, fields).flatten().double()
        inverse = torch.linalg.inv(damped[j:, j:])  # of the columns that are still free
        left[:, j:] -= torch.outer(error / inverse[0, 0], inverse[0])
    assert torch.equal(found.codes.float(), codes)


def test_a_channel_that_never_fires_does_no_harm() -> None:
    weight, hessian = matrix_and_products()
    hessian[7] = hessian[:, 7] = 0
    found = gptq(weight, hessian, get_grid("Q4_0"), Options())
    assert bool(found.dequantize().isfinite().all())


def test_a_model_is_quantized_matrix_by_matrix(tiny_llama: Path, calibration_text: Path, tmp_path: Path) -> None:
    run = make_run(tiny_llama, tmp_path / "run", "onnx:w2g32-asym")
    tokens = calibration_tokens(str(calibration_text), load_tokenizer(tiny_llama), 4, 64)
    found = quantize(tiny_llama, run, tokens, Options())
    assert set(found) == {n for n in run.names() if run.is_quantized(n) and ".layers." in n}
    assert len(found) == 35
    name = "model.layers.4.mlp.down_proj.weight"
    assert found[name].grid.name == run.quantized(name).grid.name == "w2g32-asym"
    assert not torch.equal(found[name].codes, run.quantized(name).codes)
