"""Arithmetic of the grids: round trips, adversarial blocks, schemes and fallbacks."""

from __future__ import annotations

import math
import re

import pytest
import torch
from adversarial import ADVERSARIAL, adversarial_matrix
from hypothesis import given, settings
from hypothesis import strategies as st

from signround_edge.errors import UserError
from signround_edge.formats import GRIDS, as_matmul_nbits, get_grid
from signround_edge.formats.scale_search import extreme_scales
from signround_edge.formats.super_block import SuperBlockGrid
from signround_edge.schemes.gguf_presets import ModelTraits, Place, Role
from signround_edge.schemes.scheme import after_fallback, known_schemes, parse_scheme

ALL_GRIDS = sorted(GRIDS)


# One matrix of all kinds, whose rows have nothing to do with each other; each kind by itself is a full test.
@pytest.mark.parametrize(
    "kinds",
    [ADVERSARIAL, *[pytest.param((kind,), marks=pytest.mark.full) for kind in ADVERSARIAL]],
    ids=["all", *ADVERSARIAL],
)
@pytest.mark.parametrize("name", ALL_GRIDS)
def test_adversarial_blocks_stay_finite_and_valid(name: str, kinds: tuple[str, ...]) -> None:
    grid = get_grid(name)
    weight = torch.cat([adversarial_matrix(kind, rows=3, cols=3 * grid.row_multiple) for kind in kinds])
    tensor = grid.quantize(weight, grid.search(grid.blocked(weight), torch.ones(1)))
    assert tensor.problem() is None
    assert bool(tensor.dequantize().isfinite().all())


@pytest.mark.parametrize("name", ALL_GRIDS)
def test_rounding_again_on_the_same_scales_changes_nothing(name: str) -> None:
    grid = get_grid(name)
    weight = torch.randn(8, 2 * grid.row_multiple, generator=torch.Generator().manual_seed(1))
    tensor = grid.quantize(weight, grid.search(grid.blocked(weight), torch.ones(1)))
    again = grid.round_codes(grid.blocked(tensor.dequantize()), tensor.fields)
    assert torch.equal(again.reshape(tensor.shape).to(grid.code_dtype), tensor.codes)


@pytest.mark.parametrize("name", ALL_GRIDS)
def test_levels_rounded_in_the_search_are_those_of_the_codes(name: str) -> None:
    grid = get_grid(name)
    weight = torch.randn(64, 8 * grid.row_multiple, generator=torch.Generator().manual_seed(3))
    blocks = grid.blocked(weight)
    fields = grid.store(grid.search(blocks, torch.ones(1)))
    assert torch.equal(grid.round_levels(blocks, fields), grid.levels(grid.round_offsets(blocks, fields)))


@pytest.mark.parametrize("name", ALL_GRIDS)
def test_search_beats_the_extremes_on_weighted_error(name: str) -> None:
    grid = get_grid(name)
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(16, 4 * grid.row_multiple, generator=generator)
    importance = torch.rand(weight.shape[1], generator=generator).view(1, -1, grid.block_size) ** 4

    def error(scales: object) -> float:
        approx = grid.quantize(weight, scales).dequantize()  # type: ignore[arg-type]
        return float((grid.blocked(approx - weight).square() * importance).sum())

    assert error(grid.search(grid.blocked(weight), importance)) < error(extreme_scales(grid, grid.blocked(weight)))


# Block scales alone find a grid again; super-scales are searched jointly with their sub-scales, to a small error.
@pytest.mark.parametrize("source", [n for n in ALL_GRIDS if not isinstance(get_grid(n), SuperBlockGrid)])
def test_weights_that_lie_on_the_grid_stay_exact(source: str) -> None:
    assert error_of_weights_on(source, source) == 0


@pytest.mark.parametrize(
    ("source", "finer"),
    [("Q4_0", "Q4_1"), ("Q4_0", "Q5_0"), ("Q4_0", "Q5_1"), ("Q4_0", "w4g32-asym"), ("Q4_0", "Q8_0"), ("Q4_1", "Q5_1")],
)
def test_weights_on_a_coarser_grid_stay_exact(source: str, finer: str) -> None:
    assert error_of_weights_on(source, finer) < 1e-6  # a block with few of its codes in use may miss it


def error_of_weights_on(source: str, target: str) -> float:
    """Weighted squared error, relative, of rounding to `target` what an absmax quantizer has left on `source`."""
    generator = torch.Generator().manual_seed(4)
    coarse, grid = get_grid(source), get_grid(target)
    weight = torch.randn(64, 4 * math.lcm(grid.row_multiple, coarse.row_multiple), generator=generator)
    weight = coarse.quantize(weight, extreme_scales(coarse, coarse.blocked(weight))).dequantize()
    importance = torch.rand(weight.shape[1], generator=generator)
    scales = grid.search(grid.blocked(weight), importance.view(1, -1, grid.block_size))
    errors = (grid.quantize(weight, scales).dequantize() - weight).square() * importance
    return float(errors.sum() / (weight.square() * importance).sum())


@given(st.sampled_from(ALL_GRIDS), st.integers(0, 2**31), st.floats(1e-6, 1e3))
@settings(max_examples=60, deadline=None)
def test_matmul_nbits_view_holds_the_same_weights(name: str, seed: int, spread: float) -> None:
    grid = get_grid(name)
    weight = torch.randn(2, grid.row_multiple, generator=torch.Generator().manual_seed(seed)) * spread
    tensor = grid.quantize(weight, grid.search(grid.blocked(weight), torch.ones(1)))
    view = as_matmul_nbits(tensor)
    if view is None:
        assert not get_grid(name).even or name in ("Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K")  # a real minimum
        return
    codes = view.codes.view(2, -1, view.block_size).float() - view.zero_points.float().unsqueeze(-1)
    assert torch.equal((codes * view.scales.unsqueeze(-1)).view(2, -1), tensor.dequantize())
    assert int(view.codes.max()) < 2**view.bits


def test_one_grid_serves_gguf_and_onnx() -> None:
    scheme = parse_scheme("gguf:q4_0,onnx:w4g32")
    assert scheme.targets == ("gguf", "onnx")
    assert scheme.preset.base == "Q4_0"
    assert get_grid("w4g32") is get_grid("Q4_0")
    assert get_grid("w8g32") is get_grid("Q8_0")


def test_an_unknown_scheme_is_answered_with_those_that_are_near_it() -> None:
    with pytest.raises(UserError) as error:
        parse_scheme("gguf:q4_k_n")
    near = re.search(r"near it are (.*), and docs/formats\.md lists all", str(error.value))
    assert near is not None
    assert set(near[1].split(", ")) <= set(known_schemes())
    assert "gguf:q4_k_m" in near[1]


def test_schemes_that_share_no_grid_are_refused() -> None:
    with pytest.raises(UserError, match="do not share a grid"):
        parse_scheme("gguf:q4_0,onnx:w4g128")


@pytest.mark.parametrize(
    ("scheme", "role", "cols", "expected"),
    [
        ("gguf:q4_0", Role.OUTPUT, 768, "Q6_K"),
        ("gguf:q4_0", Role.OUTPUT, 576, "Q8_0"),
        ("gguf:q8_0", Role.OUTPUT, 768, "Q8_0"),
        ("gguf:q2_0", Role.OTHER, 576, "Q2_0"),
        ("gguf:q2_0", Role.OTHER, 96, "Q4_0"),
        ("gguf:q2_k_s", Role.OTHER, 576, "Q4_0"),
        ("gguf:q3_k_s", Role.OTHER, 576, "Q4_0"),
        ("gguf:q4_k_s", Role.OTHER, 576, "Q5_0"),
        ("gguf:q4_k_s", Role.OUTPUT, 576, "Q8_0"),
        ("gguf:q5_k_s", Role.OTHER, 576, "Q5_1"),
        ("gguf:iq4_xs", Role.OTHER, 576, "IQ4_NL"),
        ("gguf:q4_0", Role.OTHER, 100, None),
        ("onnx:w4g128-asym", Role.OTHER, 576, "w4g64-asym"),
        ("onnx:w4g128", Role.OTHER, 96, "Q4_0"),
        ("onnx:w4g32", Role.EMBEDDING, 576, "Q8_0"),
        ("onnx:w4g32", Role.OTHER, 80, "w4g16"),
        ("onnx:w4g32", Role.OUTPUT, 80, "w8g16"),
        ("gguf:q4_0,onnx:w4g32", Role.OTHER, 80, None),
        ("onnx:w4g32", Role.OTHER, 40, None),
    ],
)
def test_fallbacks(scheme: str, role: Role, cols: int, expected: str | None) -> None:
    parsed = parse_scheme(scheme)
    grid = after_fallback(parsed.asked_for((), Place(role), ModelTraits(), cols), cols, parsed.targets)
    assert (None if grid is None else grid.name) == expected
