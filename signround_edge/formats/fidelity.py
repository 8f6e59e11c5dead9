"""What storing does to weights besides rounding them: nothing, where they lie on the grid already, or too much."""

from __future__ import annotations

import torch
from torch import Tensor

from signround_edge.formats.grid import QuantizedTensor

_DTYPES = (torch.bfloat16, torch.float16)


def lies_on_grid(weight: Tensor, stored: QuantizedTensor) -> bool:
    """Whether weight f32 [R, K] is what is stored: exactly, or to the last digit of bf16 or fp16 where it has no more.

    A checkpoint that was trained on a grid holds code times scale rounded to its own dtype, so an fp16 scale that gives
    the very weights back need not exist.
    """
    found = stored.dequantize()
    dtype = next((d for d in _DTYPES if torch.equal(weight.to(d).float(), weight)), None)
    if dtype is None:
        return torch.equal(found, weight)
    return bool((found.sub_(weight).abs_() <= torch.finfo(dtype).eps * weight.abs()).all())


def lost_weights(weight: Tensor, stored: QuantizedTensor) -> tuple[int, int]:
    """How many of weight f32 [R, K] the format's scales cannot hold.

    Returns:
        (those that became zero as their scale is too small to be stored, those that were cut off as it is too large).
    """
    none, most = stored.grid.scales_at_their_limits(stored.fields)
    zeroed = cut = 0
    if bool(none.any()):
        zeroed = int((_grouped(weight, none) != 0).sum())
    if bool(most.any()):
        given, found = (_grouped(tensor, most).abs() for tensor in (weight, stored.dequantize()))
        cut = int((given > found.amax(1, keepdim=True)).sum())
    return zeroed, cut


def _grouped(tensor: Tensor, chosen: Tensor) -> Tensor:
    """The values of [R, K] that share a scale, of the chosen scales, bool [R, n]: [chosen, K/n]."""
    return tensor.reshape(*chosen.shape, -1)[chosen]
