"""Weight matrices that break careless quantizers, shared by all differential tests."""

from __future__ import annotations

import torch
from torch import Tensor

from signround_edge.formats import QuantizedTensor, get_grid
from signround_edge.formats.ggml_vectors import VectorGrid

ADVERSARIAL = ("random", "zeros", "constant", "negative", "outlier", "subnormal", "fp16_max", "tiny_scales")


def adversarial_matrix(kind: str, rows: int, cols: int, seed: int = 0) -> Tensor:
    """A matrix f32 [rows, cols] of the named kind."""
    normal = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))
    if kind == "random":
        return normal
    if kind == "zeros":
        return torch.zeros(rows, cols)
    if kind == "constant":
        return torch.full((rows, cols), 0.3)
    if kind == "negative":
        return -normal.abs() - 1
    if kind == "outlier":
        matrix = normal * 1e-3
        matrix[:, ::32] = 50.0
        return matrix
    if kind == "subnormal":
        return normal * 1e-40
    if kind == "fp16_max":
        return torch.where(normal > 0, 65504.0, -65504.0)
    assert kind == "tiny_scales", kind
    return normal * 2.0**-22


def random_fields(name: str, rows: int, cols: int, generator: torch.Generator) -> QuantizedTensor:
    """Every code of the range, every field drawn from all its values: also scales that no search would choose."""
    grid = get_grid(name)
    codes = torch.randint(grid.code_min, grid.code_max + 1, (rows, cols), generator=generator)
    if isinstance(grid, VectorGrid):
        codes = random_vectors(grid, codes, generator)
    fields = {}
    for field, (shape, dtype) in grid.field_shapes(rows, cols).items():
        if dtype == torch.float16:
            bits = torch.randint(-(1 << 15), 1 << 15, shape, generator=generator, dtype=torch.int16)
            values = bits.view(torch.float16)
            fields[field] = torch.where(values.isfinite(), values, torch.zeros_like(values))
        else:
            low, high = grid.field_ranges.get(field, (torch.iinfo(dtype).min, torch.iinfo(dtype).max))
            fields[field] = torch.randint(low, high + 1, shape, generator=generator).to(dtype)
    return QuantizedTensor(grid, codes.to(grid.code_dtype), fields)


def random_vectors(grid: VectorGrid, codes: Tensor, generator: torch.Generator) -> Tensor:
    """Codes [R, K] of any entries of the table, with signs of the given ones; the first of eight keeps them even."""
    entries = grid.vectors.entries(torch.device("cpu"))
    if grid.vectors.signed:
        return entries[torch.randint(len(entries), (codes.numel() // 8,), generator=generator)].view(codes.shape)
    numbers = torch.randint(len(entries), (codes.numel() // grid.vectors.size,), generator=generator)
    negative = codes.view(-1, 8) < grid.anchor
    if grid.vectors.even_signs:
        negative[:, 0] ^= negative.sum(1).bitwise_and(1).bool()
    magnitude = entries[numbers].view(-1, 8)
    return torch.where(negative, grid.anchor - 1 - magnitude, grid.anchor + magnitude).view(codes.shape)
