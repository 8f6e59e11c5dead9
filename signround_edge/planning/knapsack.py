"""One option of each group, the least cost in all, under a budget of bytes: a multiple-choice knapsack, by HiGHS."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Option:
    """One type of a group of tensors.

    Attributes:
        kind: the type's name.
        nbytes: of all its tensors in the file.
        cost: in nats a token.
    """

    kind: str
    nbytes: int
    cost: float


def least_bytes(groups: Sequence[Sequence[Option]]) -> int:
    """Bytes of the smallest options."""
    return sum(min(option.nbytes for option in options) for options in groups)


def most_bytes(groups: Sequence[Sequence[Option]]) -> int:
    """Bytes beyond which nothing gets better: those of the cheapest options, of equal ones the smallest."""
    return sum(min(options, key=lambda o: (o.cost, o.nbytes)).nbytes for options in groups)


def solve(groups: Sequence[Sequence[Option]], budget: int) -> list[Option]:
    """The options of least cost whose bytes are at most `budget`, one a group.

    Raises:
        ValueError: not even the smallest ones fit.
    """
    if least_bytes(groups) > budget:
        raise ValueError(f"{budget} bytes are less than {least_bytes(groups)}")
    kept = [undominated(options) for options in groups]
    if most_bytes(kept) <= budget:
        return [options[-1] for options in kept]
    room = budget
    while True:
        chosen = _solve(kept, room)
        beyond = sum(option.nbytes for option in chosen) - budget
        if beyond <= 0:
            return chosen
        room -= beyond  # the solver's tolerance for a constraint, which is a share of large numbers


def undominated(options: Sequence[Option]) -> list[Option]:
    """The options that no other one beats in bytes and cost both, ascending in bytes."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda o: (o.nbytes, o.cost)):
        if not kept or option.cost < kept[-1].cost:
            kept.append(option)
    return kept


def _solve(groups: Sequence[Sequence[Option]], budget: int) -> list[Option]:
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    flat = [(number, option) for number, options in enumerate(groups) for option in options]
    least = least_bytes(groups)
    smallest = [min(option.nbytes for option in options) for options in groups]
    extra = np.array([option.nbytes - smallest[number] for number, option in flat])
    unit = math.gcd(*map(int, extra), 1 << 40)  # tensors are padded: the same budget in smaller numbers
    costs = np.array([option.cost for _, option in flat])
    rows = np.array([number for number, _ in flat])
    choice = csr_array((np.ones(len(flat)), (rows, np.arange(len(flat)))), shape=(len(groups), len(flat)))
    with stdout_to_stderr():
        found = milp(
            costs / (costs.max() or 1),
            integrality=np.ones(len(flat)),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(choice, 1, 1),
                LinearConstraint((extra / unit)[None, :], -np.inf, (budget - least) // unit),
            ],
            options={"mip_rel_gap": 1e-6, "time_limit": 60},
        )
    assert found.x is not None, found.message
    values: NDArray[np.float64] = found.x
    chosen: list[Option] = []
    for number in range(len(groups)):
        own = np.flatnonzero(rows == number)
        chosen.append(flat[int(own[values[own].argmax()])][1])
    return chosen


@contextlib.contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """Within, what C code prints goes to stderr: HiGHS leaves lines of its own now and then, and stdout is for JSON."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        with contextlib.suppress(TypeError, OSError):  # Windows has no library that is named by None
            ctypes.CDLL(None).fflush(None)
        os.dup2(kept, 1)
        os.close(kept)


def frontier(groups: Sequence[Sequence[Option]]) -> list[tuple[int, float]]:
    """(bytes, cost) from the smallest options to the best: where a budget is used up to the last byte by what gains
    the most a byte. Between two of them no mixture of options lies below their line."""
    hulls = [_hull(undominated(options)) for options in groups]
    size, cost = sum(hull[0].nbytes for hull in hulls), sum(hull[0].cost for hull in hulls)
    steps = [
        ((b.cost - a.cost) / (b.nbytes - a.nbytes), b.nbytes - a.nbytes, b.cost - a.cost)
        for hull in hulls
        for a, b in itertools.pairwise(hull)
    ]
    points = [(size, cost)]
    for _, more, less in sorted(steps):
        size, cost = size + more, cost + less
        points.append((size, cost))
    return points


def _hull(options: list[Option]) -> list[Option]:
    """The lower convex hull of undominated options."""
    kept: list[Option] = []
    for option in options:
        while len(kept) > 1 and _slope(kept[-2], kept[-1]) >= _slope(kept[-1], option):
            kept.pop()
        kept.append(option)
    return kept


def _slope(a: Option, b: Option) -> float:
    return (b.cost - a.cost) / (b.nbytes - a.nbytes)
