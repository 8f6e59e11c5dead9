"""The integer program finds what trying every choice finds."""

from __future__ import annotations

import ctypes
import itertools
import random
import sys

import pytest

from signround_edge.planning.knapsack import Option, frontier, least_bytes, most_bytes, solve, stdout_to_stderr


def groups_of(seed: int) -> list[list[Option]]:
    """Six groups of four types; sizes are multiples of 32, costs fall with bytes but for one type that is inferior."""
    draw = random.Random(seed)
    found = []
    for _ in range(6):
        rows = draw.randrange(1, 40)
        weight = draw.uniform(0.1, 10)
        options = [Option(str(bits), 32 * rows * bits, weight * 4.0**-bits) for bits in (2, 3, 4, 8)]
        found.append([*options, Option("inferior", 32 * rows * 4, weight)])
    return found


def best_by_trial(groups: list[list[Option]], budget: int) -> float:
    return min(
        sum(o.cost for o in choice) for choice in itertools.product(*groups) if sum(o.nbytes for o in choice) <= budget
    )


@pytest.mark.parametrize("seed", range(4))
def test_the_choice_is_the_best_of_all_that_fit(seed: int) -> None:
    groups = groups_of(seed)
    least, most = least_bytes(groups), most_bytes(groups)
    for share in (0.0, 0.1, 0.45, 0.8, 1.0):
        budget = least + int(share * (most - least))
        chosen = solve(groups, budget)
        assert all(option in options for option, options in zip(chosen, groups, strict=True))
        assert sum(o.nbytes for o in chosen) <= budget
        assert sum(o.cost for o in chosen) == pytest.approx(best_by_trial(groups, budget), rel=1e-5)


def test_no_choice_fits_less_than_the_smallest_options() -> None:
    groups = groups_of(0)
    with pytest.raises(ValueError, match="bytes are less than"):
        solve(groups, least_bytes(groups) - 1)


def test_no_mixture_lies_below_the_frontier() -> None:
    groups = groups_of(1)
    points = frontier(groups)
    assert points[0][0] == least_bytes(groups)
    assert points[-1][0] == most_bytes(groups)
    for (size, cost), (more, less) in itertools.pairwise(points):
        assert more > size
        assert less < cost
        middle = (size + more) // 2
        on_line = cost + (less - cost) * (middle - size) / (more - size)
        assert best_by_trial(groups, middle) >= on_line - 1e-9
        assert best_by_trial(groups, size) == pytest.approx(cost, rel=1e-5)


@pytest.mark.skipif(sys.platform == "win32", reason="C's own library has no name there")
def test_what_the_solver_prints_stays_out_of_stdout(capfd: pytest.CaptureFixture[str]) -> None:
    library = ctypes.CDLL(None)
    with stdout_to_stderr():
        library.printf(b"HighsMipSolverData::something\n")
    library.fflush(None)
    assert capfd.readouterr() == ("", "HighsMipSolverData::something\n")
