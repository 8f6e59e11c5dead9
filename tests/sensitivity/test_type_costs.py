"""Costs of types: some rows stand for all of a matrix."""

from __future__ import annotations

import pytest
import torch

from signround_edge.formats import get_grid
from signround_edge.sensitivity import cost
from signround_edge.sensitivity.cost import lookup_cost, matrix_cost
from signround_edge.sensitivity.measured import LookupSensitivity, MatrixSensitivity


def heavy_tailed(*shape: int) -> torch.Tensor:
    """Positive numbers, a few of which are most of their sum."""
    return (2 * torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + shape[0]))).exp()


def weights(rows: int, cols: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(rows, cols, generator=generator) * heavy_tailed(rows, 1)


@pytest.mark.parametrize("kind", ["Q2_K", "Q4_K", "Q8_0", "IQ2_XXS"])
def test_a_few_rows_tell_the_cost_of_a_matrix(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = weights(1000, 256)
    found = MatrixSensitivity(heavy_tailed(1000), torch.ones(256), heavy_tailed(256))
    some = matrix_cost(found, weight)(get_grid(kind))
    monkeypatch.setattr(cost, "_ROWS", 1000)
    every = matrix_cost(found, weight)(get_grid(kind))
    rounded = get_grid(kind).quantize(weight, cost.initial_scales(get_grid(kind), weight, torch.ones(256), "search"))
    errors = (rounded.dequantize() - weight).square()
    assert every == pytest.approx(0.5 * float(found.outputs @ errors @ found.conditional), rel=1e-4)
    assert some == pytest.approx(every, rel=0.05)


def test_rows_count_as_often_as_they_are_looked_up() -> None:
    weight, grid = weights(2000, 64), get_grid("Q4_0")
    frequencies = torch.zeros(2000)
    frequencies[100:900] = heavy_tailed(800)
    frequencies /= frequencies.sum()
    found = LookupSensitivity(heavy_tailed(64), frequencies)
    rounded = grid.quantize(weight, cost.initial_scales(grid, weight, torch.ones(64), "search")).dequantize()
    expected = 0.5 * float(frequencies @ (rounded - weight).square() @ found.outputs)
    assert lookup_cost(found, weight)(grid) == pytest.approx(expected, rel=0.02)


def test_what_no_token_reaches_costs_nothing() -> None:
    found = MatrixSensitivity(torch.zeros(8), torch.ones(32), torch.ones(32))
    assert matrix_cost(found, weights(8, 32))(get_grid("Q4_0")) == 0
    assert matrix_cost(found, torch.zeros(8, 32))(get_grid("Q4_0")) == 0
    found = MatrixSensitivity(torch.ones(8), torch.ones(32), torch.ones(32))
    assert matrix_cost(found, torch.zeros(8, 32))(get_grid("Q4_0")) == 0
