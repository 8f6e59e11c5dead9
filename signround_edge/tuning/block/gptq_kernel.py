"""A group of GPTQ's columns in one Triton kernel on a GPU: rows beside one another, columns one after another.

With w_j what columns before the group left of column j, and e the errors within it,

    w'_j = w_j + Σ_(i before j in the group) Ũ_ij·e_i    and e_j = w_j at first − ŵ'_j

which is what `ldl.one_by_one` computes, with sums in another order. Grids that choose codes of several values together
keep that loop: their tables are searched, not indexed.

It has run through Triton's interpreter only, which is numpy, and on no GPU yet.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from signround_edge.formats import Grid
from signround_edge.tuning.block.ldl import ColumnScales

COLUMNS_AT_ONCE = 64
_ROWS_A_PROGRAM = 32  # 128 programs for 4,096 rows; their errors are 16 registers a thread


@triton.jit  # type: ignore[untyped-decorator]
def _round_columns(
    work: Any,  # [n, R]
    errors: Any,  # of these columns, [n, R]: their weights before, their errors after
    factor: Any,  # from the corner of these columns on, rows `stride` apart
    scale: Any,  # [B, R]
    minimum: Any,  # [B, R]
    inverse: Any,  # [B, R]
    blocks: Any,  # [n]
    table: Any,  # the nearest level of each half step
    lowest: Any,
    highest: Any,
    rows: Any,
    count: Any,
    stride: Any,
    has_table: tl.constexpr,
    columns_at_once: tl.constexpr,
    rows_a_program: tl.constexpr,
) -> None:
    row = tl.program_id(0) * rows_a_program + tl.arange(0, rows_a_program)
    inside = row < rows
    column = tl.arange(0, columns_at_once)
    found = tl.zeros((columns_at_once, rows_a_program), tl.float32)
    for j in range(count):
        reach = tl.load(factor + column.to(tl.int64) * stride + j, mask=column < j, other=0.0)
        became = tl.load(work + j * rows + row, mask=inside, other=0.0) + tl.sum(found * reach[:, None], axis=0)
        place = tl.load(blocks + j) * rows + row
        low = tl.load(minimum + place, mask=inside, other=0.0)
        level = (became - low) * tl.load(inverse + place, mask=inside, other=0.0)
        level = tl.minimum(tl.maximum(level, lowest), highest)
        if has_table:
            level = tl.load(table + ((level - lowest) * 2).to(tl.int32))
        else:
            # 1.5·2²³: what is added to it is rounded to an integer, ties to the even one.
            level = (level + 12582912.0) - 12582912.0
        error = tl.load(errors + j * rows + row, mask=inside, other=0.0)
        error = error - level * tl.load(scale + place, mask=inside, other=0.0) - low
        tl.store(work + j * rows + row, became, mask=inside)
        tl.store(errors + j * rows + row, error, mask=inside)
        found = tl.where(column[:, None] == j, error[None, :], found)


def round_group(grid: Grid, scales: ColumnScales, errors: Tensor, factor: Tensor, work: Tensor, first: int) -> None:
    """Round at most `COLUMNS_AT_ONCE` columns, one after another, each with the errors of those before it.

    Args:
        errors: of all columns, f32 [K, R], contiguous.
        factor: f32 [K, K], contiguous.
        work: what the columns have become so far, f32 [n, R], contiguous; what they are when their turn comes after.
        first: number of the first of these columns among all.
    """
    count, rows = work.shape
    lowest, highest, table = grid.level_rule(work.device)
    _round_columns[(triton.cdiv(rows, _ROWS_A_PROGRAM),)](
        work,
        errors[first:],
        factor[first:, first:],
        scales.scale,
        scales.minimum,
        scales.inverse,
        scales.blocks[first:],
        scales.scale if table is None else table,
        float(lowest),
        float(highest),
        rows,
        count,
        factor.stride(0),
        has_table=table is not None,
        columns_at_once=COLUMNS_AT_ONCE,
        rows_a_program=_ROWS_A_PROGRAM,
        enable_fp_fusion=False,  # ŵ is a product, and then a sum, as everywhere else
    )
