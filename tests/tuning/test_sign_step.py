"""The fused step against autograd through the same rounding with a straight-through estimator."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from signround_edge.formats import BlockScales, get_grid
from signround_edge.formats.grid import safe_reciprocal
from signround_edge.tuning.settings import TuningSettings
from signround_edge.tuning.sign_step import RoundingState, fused_step, learning_rates

GRIDS = ["Q4_0", "Q4_1", "Q8_0", "w4g64", "w4g128-asym", "Q6_K"]


def make_state(name: str, shrink: float = 0.7) -> tuple[RoundingState, Tensor]:
    """A state with some weights clipped (scales shrunk below the search's) and V, α, β away from their start."""
    grid = get_grid(name)
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(6, 2 * grid.row_multiple, generator=generator)
    scales = grid.search(grid.blocked(weight), torch.ones(1))
    minimum = None if scales.minimum is None else scales.minimum * shrink
    state = RoundingState.start(grid, weight, BlockScales(scales.scale * shrink, minimum))
    state.v.uniform_(-0.4, 0.4, generator=generator)
    return state, torch.randn(weight.shape, generator=generator)


def straight_through(value: Tensor, rounded: Tensor) -> Tensor:
    return value + (rounded - value).detach()


def autograd_signs(state: RoundingState, gradient: Tensor) -> dict[str, Tensor]:
    """Signs of the gradients of V, α, β from autograd, with the stored (rounded) scales in the forward pass."""
    grid = state.grid
    v = state.v.clone().requires_grad_()
    alpha = state.alpha.clone().requires_grad_()
    stored_scale, stored_zero = grid.affine_view(state.fields())
    scale = straight_through(state.initial.scale * alpha, stored_scale).unsqueeze(-1)
    tuned = {"v": v, "alpha": alpha}
    if grid.affine:
        assert state.beta is not None
        assert state.initial.minimum is not None
        beta = state.beta.clone().requires_grad_()
        tuned["beta"] = beta
        stored_minimum = -stored_zero * stored_scale
        minimum = straight_through(state.initial.minimum * beta, stored_minimum).unsqueeze(-1)
        position = (state.blocks - minimum) * safe_reciprocal(scale)
    else:
        minimum = -grid.anchor * scale
        position = state.blocks * safe_reciprocal(scale) + grid.anchor
    shifted = position + v
    code = straight_through(shifted, shifted.detach().round()).clamp(grid.code_min, grid.code_max)
    weight = scale * code + minimum
    (weight * grid.blocked(gradient)).sum().backward()
    return {name: t.grad.sign() for name, t in tuned.items() if t.grad is not None}


@pytest.mark.parametrize("name", GRIDS)
def test_step_follows_the_sign_of_autograd(name: str) -> None:
    state, gradient = make_state(name)
    settings = TuningSettings(steps=10)
    expected = autograd_signs(state, gradient)
    before = {"v": state.v.clone(), "alpha": state.alpha.clone(), "beta": state.beta}
    if state.beta is not None:
        before["beta"] = state.beta.clone()
    fused_step(state, gradient, torch.empty(gradient.shape), 0, settings)
    lr, scale_lr = learning_rates(settings, 0)
    moved = (before["v"] - lr * expected["v"]).clamp(-0.5, 0.5)
    assert torch.allclose(state.v, moved, atol=1e-6)
    for key, after in (("alpha", state.alpha), ("beta", state.beta)):
        if after is not None:
            agree = torch.isclose(after, before[key] - scale_lr * expected[key], atol=1e-6).float().mean()
            assert agree > 0.99, key  # sums near zero may differ in sign by the order of addition


@pytest.mark.parametrize("name", GRIDS)
def test_forward_weight_is_the_dequantized_codes_bit_for_bit(name: str) -> None:
    state, gradient = make_state(name)
    out = torch.empty(gradient.shape)
    for step in range(3):
        fused_step(state, gradient, out, step, TuningSettings(steps=3))
        assert torch.equal(out, state.quantized().dequantize())


@pytest.mark.parametrize("optimizer", ["signsgd", "adam"])
@pytest.mark.parametrize("name", ["Q4_0", "w4g128-asym"])
def test_compiled_step_equals_the_chunked_one(name: str, optimizer: str) -> None:
    """The path that runs on a GPU (one compiled kernel), here on the CPU through the same torch.compile."""
    settings = TuningSettings(steps=4, optimizer=optimizer)
    (chunked, gradient), (compiled, _) = make_state(name), make_state(name)
    out_chunked, out_compiled = torch.empty(gradient.shape), torch.empty(gradient.shape)
    for step in range(3):
        fused_step(chunked, gradient, out_chunked, step, settings)
        fused_step(compiled, gradient, out_compiled, step, settings, compiled=True)
    assert torch.allclose(chunked.v, compiled.v, atol=1e-5)
    # A fused multiply-add may turn a tie: a code in ten thousand.
    assert float((out_chunked != out_compiled).float().mean()) < 1e-3


def test_no_scale_tuning_leaves_scales_alone() -> None:
    state, gradient = make_state("Q4_1")
    fused_step(state, gradient, torch.empty(gradient.shape), 0, TuningSettings(steps=2, tune_scales=False))
    assert torch.equal(state.alpha, torch.ones_like(state.alpha))
    assert state.beta is not None
    assert torch.equal(state.beta, torch.ones_like(state.beta))


def test_rates_fall_to_zero_and_scales_move_at_half_the_rate() -> None:
    rates = [learning_rates(TuningSettings(steps=4), step) for step in range(4)]
    assert rates == [(0.25, 0.125), (0.1875, 0.09375), (0.125, 0.0625), (0.0625, 0.03125)]
    assert learning_rates(TuningSettings(steps=4, lr=0.1, scale_lr=0.2), 0) == (0.1, 0.2)
