"""The factors of LDLQ (Chee et al. 2023, arXiv 2307.13304), and how errors go from columns to those behind them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_COLUMNS_AT_ONCE = 16  # within such a group errors go from column to column


@dataclass(frozen=True)
class ColumnScales:
    """Scales of columns in the order in which they are rounded.

    Attributes:
        scale, minimum, inverse: of each block, f32 [B, R].
        blocks: the block of each column, int64 [K].
    """

    scale: Tensor
    minimum: Tensor
    inverse: Tensor
    blocks: Tensor


def spread_errors(
    work: Tensor,
    errors: Tensor,
    factor: Tensor,
    round_some: Callable[[Tensor, int], None],
    size: int = 1,
    at_once: int = _COLUMNS_AT_ONCE,
    first: int = 0,
) -> None:
    """Round columns, or groups of `size` of them, one after another.

    Of halves of them, the errors of the first reach the second in one product.

    Args:
        work: what the columns become, f32 [n, R].
        errors: of all columns, f32 [K, R].
        factor: f32 [K, K].
        round_some: rounds at most `at_once` columns of `work`, of which it is given the number of the first; puts
            their errors into `errors`, which reach those of them that come later.
        size: columns a group.
        first: number of the first of these columns among all.
    """
    if len(work) <= at_once:
        round_some(work, first)
        return
    middle, end = first + len(work) // (2 * size) * size, first + len(work)  # groups stay whole
    before, behind = work[: middle - first], work[middle - first :]
    spread_errors(before, errors, factor, round_some, size, at_once, first)
    behind.addmm_(factor[first:middle, middle:end].T, errors[first:middle])
    spread_errors(behind, errors, factor, round_some, size, at_once, middle)


def one_by_one(
    errors: Tensor, factor: Tensor, keep_error: Callable[[int], None], size: int = 1
) -> Callable[[Tensor, int], None]:
    """`round_some` of `spread_errors` as a loop.

    Args:
        keep_error: puts the error of a column, or of the group that begins with it, into `errors` when its turn has
            come.
    """

    def round_some(work: Tensor, first: int) -> None:
        end = first + len(work)
        for j in range(first, end, size):
            keep_error(j)
            following = j + size
            if size == 1:
                work[following - first :].addr_(factor[j, following:end], errors[j])
            else:
                work[following - first :].addmm_(factor[j:following, following:end].T, errors[j:following])

    return round_some


def column_factor(hessian: Tensor, order: Tensor, damping: float) -> tuple[Tensor, Tensor] | None:
    """(Ũ f32 [K, K], diagonal of D f32 [K]) of the damped hessian f32 [K, K] with rows and columns in an order.

    None where there are none. Channels that never fired get a diagonal of 1. They are found in f32, of half the memory
    and time, and in f64 only where that fails; beside the hessian no more than two of its size are in memory.
    """
    last_first = order.flip(0)
    for dtype in (torch.float32, torch.float64):
        damped = hessian[last_first.unsqueeze(1), last_first].to(dtype)
        diagonal = damped.diagonal()
        diagonal[diagonal == 0] = 1
        diagonal += damping * diagonal.mean()
        # H in reverse order is L·Lᵀ; put into order again, L is upper triangular.
        lower = factored(damped)
        if lower is not None:
            diagonal = lower.diagonal().clone()
            return lower.div_(diagonal).flip(0, 1).float(), diagonal.square_().flip(0).float()
    return None


def factored(matrix: Tensor) -> Tensor | None:
    """L [n, n] of the symmetric matrix L·Lᵀ [n, n], in its memory; None where it is not positive definite or finite."""
    lower, failed = matrix.mT, torch.empty((), dtype=torch.int32, device=matrix.device)  # LAPACK's order: no copy
    torch.linalg.cholesky_ex(lower, out=(lower, failed))
    # What is not finite anywhere in a row of L ends on its diagonal.
    return None if failed or not lower.diagonal().isfinite().all() else lower
