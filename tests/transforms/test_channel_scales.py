"""The search of channel scales on the real grids, and what is said about `--transform`."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from signround_edge.errors import UserError
from signround_edge.formats import get_grid
from signround_edge.formats.channel_scales import ChannelScales
from signround_edge.transforms import parse_transforms
from signround_edge.transforms.channel_scales import Consumer, search_scales
from signround_edge.transforms.check import check_hidden_states, check_logits, logits_divergence
from signround_edge.transforms.folds import Fold

GRIDS = ["Q4_0", "Q4_1", "Q2_K", "Q3_K", "Q4_K", "IQ4_XS", "w4g128-asym", "w2g32-asym"]
FOLD = Fold("norm", ("layer",), (0, 256))


def consumer(grid: str, seed: int = 0, spread: float = 1.0) -> Consumer:
    """A random matrix whose inputs differ by `spread` in the logarithm of their size."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(64, 256, generator=generator)
    importance = (torch.randn(256, generator=generator) * 2 * spread).exp()
    return Consumer(weight, importance, get_grid(grid))


def output_error(one: Consumer, columns: Tensor) -> float:
    """E‖(W − Ŵ)x‖² over E‖Wx‖² for inputs of independent channels, with Ŵ rounded after scaling."""
    scaled = one.weight * columns
    importance = one.importance / columns.square()
    found = one.grid.search(one.grid.blocked(scaled), importance.view(1, -1, one.grid.block_size))
    difference = one.weight - one.grid.quantize(scaled, found).dequantize() / columns
    return float((difference.square() * one.importance).sum() / (one.weight.square() * one.importance).sum())


@pytest.mark.parametrize("grid", GRIDS)
def test_uneven_activations_lose_less_by_rounding(grid: str) -> None:
    one = consumer(grid)
    found = search_scales(FOLD, [one])
    assert found is not None
    scales, ratio = found
    assert ratio < 0.95
    assert output_error(one, scales) < 0.97 * output_error(one, torch.ones(256))
    assert float(scales.log().mean().abs()) < 0.1
    assert bool((scales > 0).all())


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000), spread=st.floats(0, 0.3), grid=st.sampled_from(GRIDS))
def test_scales_are_only_given_where_rounding_gains(seed: int, spread: float, grid: str) -> None:
    found = search_scales(FOLD, [consumer(grid, seed, spread)])
    assert found is None or found[1] < 1


@pytest.mark.parametrize("fill", [0.0, 1e-30, 1e4])
def test_channels_without_activations_or_weights_do_no_harm(fill: float) -> None:
    one = consumer("Q4_0")
    weight, importance = one.weight.clone(), one.importance.clone()
    weight[:, :40], importance[20:60] = fill, 0.0
    found = search_scales(FOLD, [Consumer(weight, importance, one.grid)])
    assert found is None or bool(found[0].isfinite().all())


def test_grouped_heads_share_the_scales_of_their_values() -> None:
    fold = Fold("v", ("o",), (0, 4), head_size=2, group=3)
    assert fold.to_columns(torch.tensor([1.0, 2, 3, 4])).tolist() == [1, 2, 1, 2, 1, 2, 3, 4, 3, 4, 3, 4]


def test_channel_scales_multiply_up() -> None:
    weight, rows, columns = torch.randn(3, 4), torch.rand(3) + 1, torch.rand(4) + 1
    scales = ChannelScales().times(columns=columns).times(rows=rows).times(rows=rows)
    assert torch.allclose(scales.apply(weight), weight * columns * (rows * rows).unsqueeze(1))
    assert torch.equal(ChannelScales().apply(weight), weight)


def test_a_transform_that_changes_the_function_is_refused() -> None:
    logits = torch.randn(8, 50, generator=torch.Generator().manual_seed(0))
    assert logits_divergence(logits, logits) == 0
    with pytest.raises(UserError, match="changes the logits"):
        check_logits(logits_divergence(logits, logits + 0.01 * torch.linspace(0, 1, 50)))
    with pytest.raises(UserError, match="decoder block 3"):
        check_hidden_states(torch.ones(1, 4, 8), torch.full((1, 4, 8), 1.01), 3)
    with pytest.raises(UserError):
        check_logits(float("nan"))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["none"], ()),
        (["channel-scales"], ("channel-scales",)),
        (["channel-scales, channel-scales"], ("channel-scales",)),
    ],
)
def test_names_of_transforms(values: list[str], expected: tuple[str, ...]) -> None:
    assert parse_transforms(values) == expected


@pytest.mark.parametrize("values", [["rotate"], ["none", "channel-scales"], [""]])
def test_unknown_transforms_are_refused(values: list[str]) -> None:
    with pytest.raises(UserError, match="--transform"):
        parse_transforms(values)
