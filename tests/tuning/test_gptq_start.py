"""GPTQ's codes as the start of tuning: what rounding the compensated weight does to a matrix's output."""

from __future__ import annotations

import pytest
import torch
from correlated_inputs import matrix_and_products, output_error
from torch import Tensor, nn

from benchmarks.gptq import Options, gptq
from signround_edge.formats import GRIDS, Grid, get_grid
from signround_edge.formats.grid import Fields
from signround_edge.tuning.block.compute import compute_context
from signround_edge.tuning.block.drift import correct_drift
from signround_edge.tuning.block.gptq import DAMPING, compensated
from signround_edge.tuning.block.ldl import column_factor
from signround_edge.tuning.block.sign_step import position_unit
from signround_edge.tuning.block.start import find_start, initial_scales
from signround_edge.tuning.block.tune import TunedUnit, tune_unit
from signround_edge.tuning.block.unit import Matrix, Unit
from signround_edge.tuning.calibration.activations import equal_weights
from signround_edge.tuning.schedule import V_TRAVEL, travel_from_gptq
from signround_edge.tuning.settings import TuningSettings

ALL_GRIDS = sorted(GRIDS)


def stored_scales(grid: Grid, weight: Tensor, products: Tensor) -> Fields:
    return grid.store(initial_scales(grid, weight, products.diagonal(), "search"))


def rounded(grid: Grid, weight: Tensor, fields: Fields) -> Tensor:
    codes = grid.round_codes(grid.blocked(weight), fields)
    return grid.pack_tensor(codes, fields).dequantize()


@pytest.mark.parametrize("cols", [512, 768])  # halves of halves of the second are no multiples of 8
@pytest.mark.parametrize("name", ["Q2_K", "IQ2_XXS", "IQ3_S", "IQ1_M"])
def test_the_loss_is_that_of_the_sum_over_groups(name: str, cols: int) -> None:
    """LDLQ said plainly, group after group, next to the recursion over halves."""
    grid, damping = get_grid(name), 0.03
    weight, products = matrix_and_products(cols=cols)
    fields = stored_scales(grid, weight, products)
    order = products.diagonal().view(-1, grid.group).sum(1).argsort(descending=True, stable=True)
    order = (order.unsqueeze(1) * grid.group + torch.arange(grid.group)).flatten()
    found = column_factor(products, order, damping)
    assert found is not None
    factor, rounded_so_far = found[0].double(), weight.double().clone()
    for start in range(0, cols, grid.group):
        before, now = order[:start], order[start : start + grid.group]
        whole = factor[: start + grid.group, start : start + grid.group]
        whole = whole @ torch.linalg.inv(whole[start:])
        errors = (weight - rounded_so_far)[:, before]
        became = weight.double()
        became[:, now] += errors @ whole[:start]
        rounded_so_far[:, now] = rounded(grid, became.float(), fields)[:, now].double()
    plain = output_error(weight, rounded_so_far.float(), products)
    ours = output_error(weight, rounded(grid, compensated(weight, products, grid, fields, damping), fields), products)
    assert ours < 1.1 * plain  # groups of several values go by the diagonal of their part of D, which is better


@pytest.mark.parametrize("damping", DAMPING)
@pytest.mark.parametrize("name", ALL_GRIDS)
def test_output_error_is_far_below_plain_rounding(name: str, damping: float) -> None:
    grid = get_grid(name)
    weight, products = matrix_and_products(cols=512)
    fields = stored_scales(grid, weight, products)
    found = rounded(grid, compensated(weight, products, grid, fields, damping), fields)
    plain = rounded(grid, weight, fields)
    assert output_error(weight, found, products) < 0.6 * output_error(weight, plain, products)


@pytest.mark.parametrize("name", ["Q4_0", "w4g32-asym", "Q4_K", "IQ4_XS"])
def test_codes_are_those_of_the_reference(name: str) -> None:
    """Sums are taken in another order, so that a code in a thousand may fall to the other side."""
    grid = get_grid(name)
    weight, products = matrix_and_products()
    reference = gptq(weight, products, grid, Options(damping=0.03))
    work = compensated(weight, products, grid, reference.fields, 0.03)
    codes = grid.round_codes(grid.blocked(work), reference.fields).reshape(weight.shape)
    assert float((codes != reference.codes).float().mean()) < 1e-3


@pytest.mark.parametrize("name", ALL_GRIDS)
def test_independent_inputs_change_nothing(name: str) -> None:
    grid = get_grid(name)
    weight, _ = matrix_and_products(cols=512)
    fields = stored_scales(grid, weight, torch.eye(512))
    assert torch.equal(compensated(weight, torch.eye(512), grid, fields, 0.03), weight)


@pytest.mark.parametrize("name", ALL_GRIDS)
def test_blocks_of_one_value_stay_finite(name: str) -> None:
    grid = get_grid(name)
    _, products = matrix_and_products(cols=512)
    weight = torch.full((4, 512), -0.25)
    weight[1] = 0
    work = compensated(weight, products, grid, stored_scales(grid, weight, products), 0.03)
    assert bool(work.isfinite().all())
    assert float((work[1]).abs().max()) == 0


def test_channels_that_never_fire_and_repeated_ones_do_no_harm() -> None:
    grid = get_grid("Q4_0")
    weight, products = matrix_and_products()
    products[7] = products[:, 7] = 0
    products[9], products[:, 9] = products[8], products[:, 8]  # not of full rank
    products[9, 9] = products[8, 8]
    found = column_factor(products, torch.arange(len(products)), 0.01)
    assert found is not None
    assert all(bool(part.isfinite().all()) for part in found)
    assert bool(compensated(weight, products, grid, stored_scales(grid, weight, products), 0.03).isfinite().all())


def test_inputs_without_a_factor_leave_the_weight_as_it_is() -> None:
    grid = get_grid("Q4_0")
    weight, products = matrix_and_products()
    fields = stored_scales(grid, weight, products)
    products[3, 3] = torch.inf
    assert torch.equal(compensated(weight, products, grid, fields, 0.03), weight)


SETTINGS = TuningSettings(steps=1, lr=1e-6, compute_dtype="float32", tune_scales=False)


def unit_of_one(mix: Tensor, held_out_mix: Tensor | None = None, samples: int = 32) -> Unit:
    """A Q4_0 matrix of 64 inputs, mixed by `mix`; 8 tokens a sample, 8 samples held out, if wanted mixed otherwise."""
    torch.manual_seed(1)
    inputs, module, grid = torch.randn(40, 8, 64), nn.Linear(64, 16, bias=False), get_grid("Q4_0")
    inputs = torch.cat([inputs[:32] @ mix, inputs[32:] @ (mix if held_out_mix is None else held_out_mix)])
    weight = module.weight.detach().clone()
    matrix = Matrix("m", module, grid, weight, torch.ones(64))
    target, train = inputs @ weight.T, torch.arange(samples)
    return Unit(
        [matrix],
        lambda index: module(inputs[index]),
        lambda index: target[index],
        equal_weights,
        train,
        torch.arange(32, 40),
        module,
    )


def tune_one(unit: Unit) -> tuple[TunedUnit, Tensor]:
    """(result of a single step, nearest codes)."""
    (m,) = unit.matrices
    nearest = m.grid.quantize(m.weight, initial_scales(m.grid, m.weight, m.importance, "search")).codes
    return tune_unit(unit, SETTINGS, iter([unit.train[:8]]), torch.device("cpu")), nearest


def mixing() -> Tensor:
    return torch.randn(64, 64, generator=torch.Generator().manual_seed(2))


def test_tuning_starts_from_the_nearest_codes_where_gptq_is_worse_on_held_out_samples() -> None:
    alike = torch.ones(64, 64) / 64 + 0.01 * torch.eye(64)
    tuned, nearest = tune_one(unit_of_one(alike, held_out_mix=torch.eye(64)))
    assert tuned.report.start == tuned.report.rounded
    assert torch.equal(tuned.tensors["m"].codes, nearest)


def test_tuning_starts_from_gptq_where_that_is_better() -> None:
    tuned, nearest = tune_one(unit_of_one(mixing()))
    assert tuned.report.start < 0.8 * tuned.report.rounded
    assert tuned.report.tuned <= tuned.report.start
    assert not torch.equal(tuned.tensors["m"].codes, nearest)


@pytest.mark.parametrize(("samples", "damping"), [(6, 0.3), (32, 0.03)])
def test_damping_is_higher_where_text_is_short(samples: int, damping: float) -> None:
    unit = unit_of_one(mixing(), samples=samples)
    (m,) = unit.matrices
    autocast = compute_context(SETTINGS, [m.grid], torch.device("cpu"))
    products = correct_drift(unit, SETTINGS.batch_size, autocast, lambda: 0.0).hessians
    start = find_start(unit, SETTINGS, autocast)
    fields = start.tensors["m"].fields
    expected = m.grid.offsets(m.grid.blocked(compensated(m.weight, products["m"], m.grid, fields, damping)), fields)
    assert torch.allclose(start.states["m"].offsets(fields), expected, rtol=0, atol=position_unit(m.grid))
    assert start.loss < start.rounded


def test_v_travels_further_the_less_gptq_did_and_the_more_samples_are_seen() -> None:
    few, many = TuningSettings(steps=20, batch_size=4), TuningSettings(steps=200, batch_size=8)
    travel = travel_from_gptq(few, 16, 0.5, distinct=28)
    assert travel < travel_from_gptq(many, 16, 0.5, distinct=28) < travel_from_gptq(many, 16, 0.8, distinct=28)
    assert travel == travel_from_gptq(few, 16, 0.5, distinct=56) < travel_from_gptq(few, 16, 0.5, distinct=112)
    assert travel < travel_from_gptq(few, 4, 0.5, distinct=28)
    assert travel_from_gptq(many, 4, 1.0, distinct=28) == V_TRAVEL
