"""Weight matrices that break careless quantizers, shared by all differential tests."""

from __future__ import annotations

import torch
from torch import Tensor

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
