"""A matrix whose inputs are correlated, and the squared error of its output: what GPTQ is about."""

from __future__ import annotations

import torch
from torch import Tensor


def matrix_and_products(rows: int = 24, cols: int = 256) -> tuple[Tensor, Tensor]:
    """A random weight, and Σ x·xᵀ of correlated inputs with a few loud channels."""
    torch.manual_seed(0)
    inputs = torch.randn(2000, 48) @ torch.randn(48, cols) * torch.rand(cols).pow(3) + 0.3 * torch.randn(2000, cols)
    return torch.randn(rows, cols) * 0.1, inputs.T @ inputs


def output_error(weight: Tensor, approximation: Tensor, products: Tensor) -> float:
    """tr((W − Ŵ)·H·(W − Ŵ)ᵀ): the squared error of the matrix's output."""
    difference = (weight - approximation).double()
    return float((difference @ products.double() * difference).sum())
