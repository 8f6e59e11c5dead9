"""The dtype of matrix products while a unit is tuned."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch

from signround_edge.formats import Grid
from signround_edge.tuning.settings import TuningSettings


def compute_dtype(settings: TuningSettings, grids: Iterable[Grid], device: torch.device) -> torch.dtype:
    """The dtype of matrix products while a unit on these grids is tuned.

    bfloat16 errs by 0.2 %, a fortieth of what rounding to 4 bits does, but as much as rounding to 8 bits.
    """
    native = device.type == "cuda" or torch.cpu._is_avx512_bf16_supported()
    bfloat16 = {"auto": native and _are_coarse(grids), "float32": False, "bfloat16": True}[settings.compute_dtype]
    return torch.bfloat16 if bfloat16 else torch.float32


def hidden_dtype(
    settings: TuningSettings, grids: Iterable[Grid], device: torch.device
) -> Literal["float32", "bfloat16"]:
    """The dtype in which hidden states are kept between the blocks of a run whose matrices are on these grids.

    Each rounding to bfloat16 errs by 0.11 % of a value (root mean square), wherever it stands: the relative loss of a
    token is 1.3e-6 by it, a thousandth of what rounding to 4 bits leaves and as much as rounding to 8 bits does. A CPU
    copies them over no bus, and keeps f32.
    """
    if settings.hidden_dtype != "auto":
        return settings.hidden_dtype
    return "bfloat16" if device.type == "cuda" and _are_coarse(grids) else "float32"


def _are_coarse(grids: Iterable[Grid]) -> bool:
    """Whether all have codes of up to 5 bits."""
    return all(grid.code_max - grid.code_min < 32 for grid in grids)


def compute_context(settings: TuningSettings, grids: Iterable[Grid], device: torch.device) -> torch.autocast:
    """Within, matrix products have `compute_dtype`."""
    dtype = compute_dtype(settings, grids, device)
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)
