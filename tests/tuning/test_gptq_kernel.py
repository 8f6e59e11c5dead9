"""GPTQ's columns by the Triton kernel, run through Triton's interpreter on the CPU, against the loop."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from signround_edge.formats import GRIDS

ROOT = Path(__file__).parent.parent.parent
SINGLE = sorted(name for name, grid in GRIDS.items() if grid.group == 1)
KINDS = ["Q4_K", "IQ4_XS"]

# Triton reads the variable when it is imported, so this has a process of its own.
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

_COMPARE = """
import json, sys
import torch
from correlated_inputs import matrix_and_products
from signround_edge.formats import get_grid
from signround_edge.formats.grid import safe_reciprocal
from signround_edge.tuning.block.gptq import round_columns
from signround_edge.tuning.block.ldl import ColumnScales, column_factor
from signround_edge.tuning.block.start import initial_scales

found = {}
for name in sys.argv[1:]:
    grid = get_grid(name)
    weight, products = matrix_and_products(rows=20, cols=256)
    fields = grid.store(initial_scales(grid, weight, products.diagonal(), "absmax"))
    order = products.diagonal().argsort(descending=True, stable=True)
    factor = column_factor(products, order, 0.03)[0]
    scale = grid.affine_view(fields)[0].T.contiguous()
    minimum = grid.from_levels(torch.zeros_like(grid.blocked(weight)[..., :1]), fields)[..., 0].T.contiguous()
    scales = ColumnScales(scale, minimum, safe_reciprocal(scale), order // grid.block_size)
    codes = []
    for by_kernel in (False, True):
        work = weight.T[order]
        round_columns(work, factor, grid, scales, by_kernel)
        became = torch.empty_like(work).index_copy_(0, order, work).T.contiguous()
        codes.append(grid.round_codes(grid.blocked(became), fields))
    moved = grid.round_codes(grid.blocked(weight), fields) != codes[0]
    found[name] = [float((codes[0] != codes[1]).float().mean()), float(moved.float().mean())]
print(json.dumps(found))
"""


def shares(names: list[str]) -> dict[str, list[float]]:
    """Of each grid: the share of codes in which kernel and loop differ, and in which the loop differs from rounding."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": f"{ROOT}:{Path(__file__).parent.parent}"}
    command = [sys.executable, "-W", "ignore", "-c", _COMPARE, *names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, list[float]] = json.loads(done.stdout)
    return found


def check(names: list[str]) -> None:
    for name, (apart, moved) in shares(names).items():
        assert apart < 1e-3, name  # sums are taken in another order: a tie in thousands falls to the other side
        assert moved > 0.02, name  # there was something to compute


@needs_triton
def test_a_kernel_a_group_of_columns_gives_the_codes_of_the_loop() -> None:
    check(KINDS)


@pytest.mark.full
@needs_triton
def test_it_does_so_on_every_grid_of_single_values() -> None:
    check(SINGLE)
