"""Vectors of llama.cpp's tables: the nearest one, signs that have to be even, and codes that are no vectors."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from signround_edge.formats import GRIDS, QuantizedTensor, get_grid
from signround_edge.formats.ggml_vectors import VectorGrid
from signround_edge.formats.vector_table import VectorTable

VECTORS = [name for name, grid in GRIDS.items() if isinstance(grid, VectorGrid)]


def vector_grid(name: str) -> VectorGrid:
    grid = get_grid(name)
    assert isinstance(grid, VectorGrid)
    return grid


def every_vector(table: VectorTable) -> Tensor:
    """All vectors of a group that are one entry, in positions; signs as the table has them."""
    entries = table.entries(torch.device("cpu")).float()
    if table.signed:
        return entries - 1
    signs = torch.tensor(list(itertools.product((1.0, -1.0), repeat=table.size)))
    if table.even_signs:
        signs = signs[signs.prod(1) > 0]
    return (signs.unsqueeze(1) * (entries + 0.5)).reshape(-1, table.size)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", [n for n in VECTORS if n != "IQ3_XXS"])  # its signs are even over two entries
def test_rounding_finds_the_nearest_vector_or_one_that_is_hardly_farther(name: str, weighted: bool) -> None:
    table = vector_grid(name).vectors
    generator = torch.Generator().manual_seed(0)
    reach = 0.8 if table.signed else len(table.magnitudes) / 2
    # Their sums differ where signs are even; otherwise it is one by one that they are compared.
    positions = torch.randn(256 if table.even_signs else 64, table.size, generator=generator) * reach
    weights = torch.rand(table.size, generator=generator) + 0.2 if weighted else torch.ones(table.size)

    def distances(vectors: Tensor) -> Tensor:
        return ((positions.unsqueeze(-2) - vectors).square() * weights).sum(-1)

    found = table.nearest(positions, weights if weighted else None)
    ours, least = distances(found.unsqueeze(1)).squeeze(1), distances(every_vector(table)).amin(1)
    slack = 1.02 if table.even_signs else 1.00001  # which sign is flipped is decided before the entry is
    assert float(ours.sum()) <= slack * float(least.sum())
    assert bool((ours >= least - 1e-4).all())


@pytest.mark.parametrize("name", ["IQ2_XXS", "IQ2_XS", "IQ3_XXS"])
def test_an_even_number_of_eight_is_negative(name: str) -> None:
    grid = vector_grid(name)
    weight = torch.randn(4, 512, generator=torch.Generator().manual_seed(1))
    codes = grid.quantize(weight, grid.search(grid.blocked(weight), torch.ones(1))).codes
    assert not ((codes.view(-1, 8) < grid.anchor).sum(1) % 2).any()


@pytest.mark.parametrize("name", VECTORS)
def test_codes_that_are_no_vectors_are_a_problem(name: str) -> None:
    grid = vector_grid(name)
    weight = torch.randn(2, 256, generator=torch.Generator().manual_seed(2))
    tensor = grid.quantize(weight, grid.search(grid.blocked(weight), torch.ones(1)))
    assert tensor.problem() is None
    size = grid.vectors.size
    for code in itertools.product(range(grid.anchor, grid.code_max + 1), repeat=size):
        changed = tensor.codes.clone()
        changed[1, -size:] = torch.tensor(code, dtype=torch.uint8)
        if int(grid.entry_numbers(changed)[1, -1]) < 0:
            break
    assert QuantizedTensor(grid, changed, tensor.fields).problem() == f"codes are no vectors of {name}'s table"
    if grid.vectors.even_signs:
        odd = tensor.codes.clone()
        odd[0, 3] = grid.code_max - odd[0, 3]
        assert QuantizedTensor(grid, odd, tensor.fields).problem() == "an odd number of eight codes is negative"
