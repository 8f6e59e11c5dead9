"""How a unit is computed while it is tuned: the dtype of its matrix products, and kernels that torch.compile makes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Literal

import torch

from signround_edge.errors import UserError
from signround_edge.formats import Grid
from signround_edge.tuning.settings import TuningSettings


def compute_dtype(settings: TuningSettings, grids: Iterable[Grid], device: torch.device) -> torch.dtype:
    """The dtype of matrix products while a unit on these grids is tuned.

    bfloat16 errs by 0.2 %, a fortieth of what rounding to 4 bits does, but as much as rounding to 8 bits.
    """
    native = device.type == "cuda" or torch.cpu._is_avx512_bf16_supported()
    coarse = all(grid.code_max - grid.code_min < 32 for grid in grids)
    bfloat16 = {"auto": native and coarse, "float32": False, "bfloat16": True}[settings.compute_dtype]
    return torch.bfloat16 if bfloat16 else torch.float32


def hidden_dtype(settings: TuningSettings) -> Literal["float32", "bfloat16"]:
    """The dtype in which hidden states are kept between blocks.

    Rounding to bfloat16 errs by 0.11 % of a value (root mean square), large or small, which is 1.3e-6 of a token's
    relative loss. It has cost 2 to 3 % in KL divergence all the same, see docs/LOG.md: "auto" keeps float32.
    """
    return "float32" if settings.hidden_dtype == "auto" else settings.hidden_dtype


def compute_context(settings: TuningSettings, grids: Iterable[Grid], device: torch.device) -> torch.autocast:
    """Within, matrix products have `compute_dtype`."""
    dtype = compute_dtype(settings, grids, device)
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)


@contextlib.contextmanager
def compiling(device: torch.device) -> Iterator[None]:
    """Within, kernels may be compiled; UserError where that is impossible."""
    try:
        yield
    except RuntimeError as error:  # torch's own kinds of it, whose modules take seconds to import
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        missing, otherwise = ("Triton and a C compiler", "give --device cpu")
        if device.type == "cpu":
            missing, otherwise = ("a C++ compiler", "leave out --compile-blocks")
        raise UserError(
            f"torch.compile cannot make kernels here ({str(error).splitlines()[0]}); install {missing}, or {otherwise}"
        ) from error
