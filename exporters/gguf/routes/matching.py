"""Recognising a parameter in someone else's file by its values: the same rows, perhaps in another order.

The run's weights are rounded and the template's are not, so rows are compared by their cosine: rounding to 2 bits still
leaves more than 0.8, other rows of a trained or random matrix are far below.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from exporters.gguf.families.row_orders import RowOrder, interleaved_rows
from exporters.gguf.functions import FUNCTIONS, ONE_PLUS, Function

Matrix = NDArray[np.float32]

_SAME = 0.75  # mean cosine of rows from which two matrices count as the same
_CLEAR = 0.98  # above it no better order is searched
_SEARCH_COLUMNS = 512
_SEARCH_ROWS = 1024
_VECTOR_ERROR = 0.5
_F16 = 0.001  # what an f16 file may be off by


class FoundVector(NamedTuple):
    """Stored value i is function(our value order[i]); None means the same order, the value itself."""

    order: RowOrder | None = None
    function: Function | None = None

    def applied(self, vector: Matrix) -> Matrix:
        """What is stored of a vector [n]."""
        ordered = vector if self.order is None else vector[self.order]
        return ordered if self.function is None else self.function.of(torch.from_numpy(ordered)).numpy()


def find_row_order(ours: Matrix, theirs: Matrix, heads: Iterable[int]) -> tuple[bool, RowOrder | None]:
    """Whether `theirs` [R, K] holds the rows of `ours` [R, K], and in which order.

    Tried in turn: the same order, interleaved halves of each head (Llama's q and k) for the head counts given, and any
    one-to-one assignment of rows.

    Returns:
        (found, order): stored row i is our row order[i]; order None means the same order.
    """
    if ours.shape != theirs.shape:
        return False, None
    rows = ours.shape[0]
    unit_ours, unit_theirs = _unit_rows(ours), _unit_rows(theirs)
    best, order = _mean_cosine(unit_ours, unit_theirs), None
    for count in dict.fromkeys(heads):
        if count > 0 and rows % (2 * count) == 0 and best < _CLEAR:
            candidate = interleaved_rows(rows, count)
            score = _mean_cosine(unit_ours[candidate], unit_theirs)
            if score > best:
                best, order = score, candidate
    if best < _CLEAR:
        assigned = _assign(unit_ours, unit_theirs)
        if assigned is not None:
            score = _mean_cosine(unit_ours[assigned], unit_theirs)
            if score > best + 1e-3:
                best, order = score, assigned
    return best >= _SAME, order


def find_vector(ours: Matrix, theirs: Matrix, orders: Iterable[RowOrder], named: bool = True) -> FoundVector | None:
    """The same for vectors [n], with the orders of the weight they belong to as candidates, and functions of values.

    Args:
        named: the vectors have the same name, so that ours may have been changed by a transform; without that, only
            equal values count.
    Returns:
        None when `theirs` is another vector.
    """
    if ours.shape != theirs.shape:
        return None
    size = float(np.linalg.norm(theirs))
    if size == 0:
        return FoundVector()  # a bias that was never trained contradicts nothing
    candidates = [FoundVector(), *(FoundVector(order) for order in orders if len(order) == len(ours))]
    candidates += [FoundVector(order, function) for order in (None, *orders) for function in FUNCTIONS]
    errors = [float(np.linalg.norm(found.applied(ours) - theirs)) for found in candidates]
    least = int(np.argmin(np.nan_to_num(errors, nan=np.inf)))
    if errors[least] > _F16 * size:
        for function in (None, *FUNCTIONS):
            found = _sorted_alike(ours, theirs, function)
            if np.linalg.norm(found.applied(ours) - theirs) <= _F16 * size:
                return found
    # Transforms may have moved a vector a little; a function of it is met exactly or not at all.
    allowed = _VECTOR_ERROR if named and candidates[least].function in (None, ONE_PLUS) else _F16
    return candidates[least] if errors[least] <= allowed * size else None


def _sorted_alike(ours: Matrix, theirs: Matrix, function: Function | None) -> FoundVector:
    """The order in which function(our values) have the sizes of theirs: any order of heads, where the values differ."""
    order = np.empty(len(ours), dtype=np.intp)
    order[np.argsort(theirs, kind="stable")] = np.argsort(FoundVector(None, function).applied(ours), kind="stable")
    return FoundVector(order, function)


def find_rows(ours: Matrix, theirs: Matrix) -> RowOrder | None:
    """Which rows of `ours` [n, K] the rows of `theirs` [R, K] are, each of another one; None when some are not there.

    For every row of theirs: stored row i is our row order[i].
    """
    if ours.shape[1] != theirs.shape[1] or len(theirs) > len(ours):
        return None
    unit_ours, unit_theirs = _unit_rows(ours), _unit_rows(theirs)
    if len(ours) == len(theirs) and _mean_cosine(unit_ours, unit_theirs) >= _CLEAR:
        return np.arange(len(ours), dtype=np.intp)
    order = _assign(unit_ours, unit_theirs)
    return order if order is not None and _mean_cosine(unit_ours[order], unit_theirs) >= _SAME else None


def _unit_rows(matrix: Matrix) -> Matrix:
    """Rows scaled to length 1; zero rows stay zero."""
    scale = np.abs(matrix).max(axis=1, keepdims=True)
    scaled = matrix / np.where(scale > 0, scale, np.float32(1))
    norm = np.linalg.norm(scaled, axis=1, keepdims=True)
    return (scaled / np.where(norm > 0, norm, 1)).astype(np.float32)


def _mean_cosine(ours: Matrix, theirs: Matrix) -> float:
    """Mean cosine over rows that are not zero on both sides; 1 when all are."""
    cosine = np.einsum("rk,rk->r", ours, theirs)
    counted = ours.any(axis=1) | theirs.any(axis=1)
    return float(cosine[counted].mean()) if counted.any() else 1.0


def _assign(ours: Matrix, theirs: Matrix) -> RowOrder | None:
    """For each of their rows our most similar one; None unless that is one-to-one."""
    step = max(1, ours.shape[1] // _SEARCH_COLUMNS)
    ours, theirs = ours[:, ::step], theirs[:, ::step]
    order = np.concatenate(
        [(theirs[i : i + _SEARCH_ROWS] @ ours.T).argmax(axis=1) for i in range(0, len(theirs), _SEARCH_ROWS)]
    )
    return order if len(np.unique(order)) == len(order) else None
