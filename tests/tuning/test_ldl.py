"""Factors of hessians: right, in their own memory, and none where there is none."""

from __future__ import annotations

import math

import pytest
import torch

from signround_edge.tuning.block.ldl import column_factor, factored


def products(size: int) -> torch.Tensor:
    inputs = torch.randn(2 * size, size, generator=torch.Generator().manual_seed(0))
    return inputs.T @ inputs


def test_the_factor_takes_the_place_of_its_matrix() -> None:
    matrix = products(64)
    copy = matrix.clone()
    lower = factored(matrix)
    assert lower is not None
    assert lower.data_ptr() == matrix.data_ptr()
    assert torch.equal(lower, lower.tril())
    torch.testing.assert_close(lower @ lower.T, copy)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("at", [(40, 3), (63, 0), (20, 20)])
def test_there_is_none_of_what_is_not_finite(value: float, at: tuple[int, int]) -> None:
    matrix = products(64)
    matrix[at] = matrix[at[::-1]] = value
    if at[0] == at[1] and value == 1e30:
        assert factored(matrix) is not None
    else:
        assert factored(matrix) is None


def test_columns_of_the_factor_are_in_the_order_given() -> None:
    hessian, order = products(64), torch.randperm(64, generator=torch.Generator().manual_seed(1))
    before = hessian.clone()
    found = column_factor(hessian, order, 0.1)
    assert found is not None
    factor, diagonal = found
    assert torch.equal(hessian, before)
    assert torch.equal(factor, factor.triu())
    damped = hessian[order][:, order] + 0.1 * hessian.diagonal().mean() * torch.eye(64)
    torch.testing.assert_close(factor * diagonal @ factor.T, damped)
