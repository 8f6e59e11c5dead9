"""The table of formats: a format is one row. Schemes and presets (which tensor gets which row) are in `schemes`."""

from __future__ import annotations

import functools
import re
from difflib import get_close_matches

from signround_edge.errors import UserError
from signround_edge.formats.ggml_codebook import (
    IQ4_TABLE,
    SIGN_TABLE,
    CodebookFp16,
    E4M3Scales,
    E8M0Scales,
    SuperCodebook,
)
from signround_edge.formats.ggml_k_quants import SuperAffine, SuperSymmetric
from signround_edge.formats.ggml_legacy import AffineFp16, SymmetricFp16
from signround_edge.formats.ggml_vectors import ShiftedVectorGrid, VectorGrid
from signround_edge.formats.grid import BlockScales, Grid, QuantizedTensor, joined
from signround_edge.formats.matmul_nbits import (
    ONNX_BITS,
    ONNX_BLOCKS,
    NBitsView,
    as_matmul_nbits,
    matmul_nbits_grid,
)

__all__ = ["GRIDS", "BlockScales", "Grid", "NBitsView", "QuantizedTensor", "as_matmul_nbits", "get_grid", "joined"]

_ROWS: tuple[Grid, ...] = (
    SymmetricFp16("Q4_0", bits=4),
    AffineFp16("Q4_1", bits=4),
    SymmetricFp16("Q5_0", bits=5),
    AffineFp16("Q5_1", bits=5),
    SymmetricFp16("Q8_0", bits=8, signed=True),
    SymmetricFp16("Q2_0", bits=2, block_size=64, anchor=1),
    CodebookFp16("Q1_0", SIGN_TABLE, bits=1, block_size=128),
    SymmetricFp16("TQ1_0", bits=2, block_size=256, anchor=1, codes=3, container=1.625),
    SymmetricFp16("TQ2_0", bits=2, block_size=256, anchor=1),
    SuperAffine("Q2_K", bits=2, block_size=16, sub_bits=4, bits_per_weight=2.625),
    SuperSymmetric("Q3_K", bits=3, block_size=16, sub_bits=6, bits_per_weight=3.4375),
    SuperAffine("Q4_K", bits=4, block_size=32, sub_bits=6, bits_per_weight=4.5),
    SuperAffine("Q5_K", bits=5, block_size=32, sub_bits=6, bits_per_weight=5.5),
    SuperSymmetric("Q6_K", bits=6, block_size=16, sub_bits=8, bits_per_weight=6.5625),
    CodebookFp16("IQ4_NL", IQ4_TABLE, bits=4),
    SuperCodebook("IQ4_XS", bits=4, block_size=32, sub_bits=6, bits_per_weight=4.25),
    ShiftedVectorGrid("IQ1_S", block_size=32, shared=1, bits_per_weight=1.5625),
    ShiftedVectorGrid("IQ1_M", block_size=8, shared=2, bits_per_weight=1.75),
    VectorGrid("IQ2_XXS", even_signs=True, block_size=32, unit=0.125, bits_per_weight=2.0625),
    VectorGrid("IQ2_XS", even_signs=True, block_size=16, unit=0.125, bits_per_weight=2.3125),
    VectorGrid("IQ2_S", even_signs=False, block_size=16, unit=0.125, bits_per_weight=2.5625),
    VectorGrid("IQ3_XXS", even_signs=True, block_size=32, unit=0.25, bits_per_weight=3.0625),
    VectorGrid("IQ3_S", even_signs=False, block_size=32, unit=1, bits_per_weight=3.4375),
    E8M0Scales("MXFP4", block_size=32, row_multiple=32),
    E4M3Scales("NVFP4", block_size=16, row_multiple=64),
    *(matmul_nbits_grid(bits, g) for bits in ONNX_BITS for g in ONNX_BLOCKS if (bits, g) not in ((4, 32), (8, 32))),
    *(matmul_nbits_grid(bits, g, asymmetric=True) for bits in ONNX_BITS for g in ONNX_BLOCKS),
)

GRIDS: dict[str, Grid] = {grid.name: grid for grid in _ROWS}

# Other names of the same grid: ONNX's symmetric block-32 formats are llama.cpp's.
ALIASES = {"w4g32": "Q4_0", "w8g32": "Q8_0"}

_BY_LOWER_CASE = {name.lower(): name for name in GRIDS} | ALIASES


def get_grid(name: str) -> Grid:
    """The grid of that name ("Q4_0", "w4g128-asym", in any case); UserError names those that are spelt most like it.

    Besides those, w<bits>g<N>[-asym] with any N: one scale a row of N values is what per-channel schemes ask for.
    """
    name = name if name in GRIDS else _BY_LOWER_CASE.get(name.lower(), name)
    grid = GRIDS.get(name) or _of_any_block_size(name)
    if grid is None:
        known = {one.lower(): one for one in (*GRIDS, *ALIASES)}
        near = ", ".join(known[one] for one in get_close_matches(name.lower(), known, 3, cutoff=0))
        raise UserError(f"unknown block format {name!r}; near it are {near}, and docs/formats.md lists all")
    return grid


@functools.cache
def _of_any_block_size(name: str) -> Grid | None:
    match = re.fullmatch(r"w([2348])g([1-9]\d{0,6})(-asym)?", name)
    return matmul_nbits_grid(int(match[1]), int(match[2]), match[3] is not None) if match else None
