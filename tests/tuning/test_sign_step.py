"""The fused step against autograd through the same rounding with a straight-through estimator."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from signround_edge.formats import get_grid
from signround_edge.formats.grid import safe_reciprocal
from signround_edge.tuning.block.sign_step import RoundingState, fused_step, learning_rates
from signround_edge.tuning.schedule import V_TRAVEL
from signround_edge.tuning.settings import TuningSettings

GRIDS = ["Q4_0", "Q4_1", "Q8_0", "w4g64", "w4g128-asym", "Q6_K", "Q4_K"]
VECTORS = ["IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_S", "IQ3_XXS", "IQ3_S"]
POSITIONS = ["fixed", "follow"]


def make_state(name: str, positions: str = "fixed", shrink: float = 0.7) -> tuple[RoundingState, Tensor]:
    """A state with some weights clipped (scales shrunk below the search's) and V, α, β away from their start."""
    grid = get_grid(name)
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(6, 2 * grid.row_multiple, generator=generator)
    scales = grid.search(grid.blocked(weight), torch.ones(1))
    minimum = None if scales.minimum is None else scales.minimum * shrink
    state = RoundingState.start(grid, weight, replace(scales, scale=scales.scale * shrink, minimum=minimum), positions)
    state.shift = torch.empty(state.v.shape).uniform_(-0.4, 0.4, generator=generator)
    return state, torch.randn(weight.shape, generator=generator)


def tuned_tensors(state: RoundingState) -> dict[str, Tensor | None]:
    return {"v": state.shift, "alpha": state.alpha, "beta": state.beta}


def straight_through(value: Tensor, rounded: Tensor) -> Tensor:
    return value + (rounded - value).detach()


def autograd_signs(state: RoundingState, gradient: Tensor) -> dict[str, Tensor]:
    """Signs of the gradients of V, α, β from autograd, with the stored (rounded) scales in the forward pass."""
    grid = state.grid
    tuned = {name: value.clone().requires_grad_() for name, value in tuned_tensors(state).items() if value is not None}
    stored_scale, stored_zero = grid.affine_view(state.fields())
    scale = straight_through(state.initial.scale * tuned["alpha"], stored_scale).unsqueeze(-1)
    if "beta" in tuned:
        assert state.initial.minimum is not None
        minimum = straight_through(state.initial.minimum * tuned["beta"], -stored_zero * stored_scale).unsqueeze(-1)
    else:  # the code of weight zero stays; a symmetric grid's is its anchor
        minimum = (grid.anchor - stored_zero).unsqueeze(-1) * scale
    if state.weights is None:
        position = state.offsets(state.fields())
    else:
        position = (state.weights - minimum if grid.affine else state.weights) * safe_reciprocal(scale)
    shifted = position + tuned["v"]
    offset = straight_through(shifted, shifted.detach().round()).clamp(*grid.offset_range)
    weight = scale * offset + minimum
    (weight * grid.blocked(gradient)).sum().backward()
    return {name: t.grad.sign() for name, t in tuned.items() if t.grad is not None}


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("name", GRIDS)
def test_step_follows_the_sign_of_autograd(name: str, positions: str) -> None:
    state, gradient = make_state(name, positions)
    settings = TuningSettings(steps=10)
    expected = autograd_signs(state, gradient)
    before = {name: None if t is None else t.clone() for name, t in tuned_tensors(state).items()}
    fused_step(state, gradient, torch.empty(gradient.shape), 0, settings)
    lr, scale_lr = learning_rates(settings, state.grid, 0)
    for key, after in tuned_tensors(state).items():
        start = before[key]
        if after is None or start is None:
            assert key not in expected
            continue
        moved = start - (lr if key == "v" else scale_lr) * expected[key]
        agree = torch.isclose(after, moved.clamp(-0.5, 0.5) if key == "v" else moved, atol=1e-5).float().mean()
        assert agree == 1 if key == "v" else agree > 0.99, key  # sums near 0 differ in sign by the order of addition


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("name", [*GRIDS, "IQ4_NL", "MXFP4", "NVFP4", "Q1_0", "TQ1_0", *VECTORS])
def test_forward_weight_is_the_dequantized_codes_bit_for_bit(name: str, positions: str) -> None:
    state, gradient = make_state(name, positions)
    out = torch.empty(gradient.shape)
    for step in range(3):
        fused_step(state, gradient, out, step, TuningSettings(steps=3))
        assert torch.equal(out, state.quantized().dequantize())


@pytest.mark.parametrize("name", [*GRIDS, "IQ4_NL", "w8g32-asym"])
def test_fixed_positions_round_as_the_weights_do_also_next_to_ties(name: str) -> None:
    grid = get_grid(name)
    weight = torch.randn(64, 2 * grid.row_multiple, generator=torch.Generator().manual_seed(5))
    scales = grid.search(grid.blocked(weight), torch.ones(1))
    fields = grid.store(scales)
    codes = grid.round_offsets(grid.blocked(weight), fields)
    up = torch.where(codes < grid.offset_range[1], 0.5, -0.5)
    between = (grid.from_offsets(codes, fields) + grid.from_offsets(codes + 2 * up, fields)) / 2
    for nearly in (1, 1 + 1e-6, 1 - 1e-6, 1 + 1e-5, 1 - 1e-5):
        near = (between * nearly).reshape(weight.shape)
        assert torch.equal(RoundingState.start(grid, near, scales).quantized().codes, grid.quantize(near, scales).codes)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q4_K", "w4g128-asym", "w8g32-asym"])
def test_fixed_positions_keep_the_codes_and_the_zero_point_while_scales_move(name: str) -> None:
    state, _ = make_state(name)
    before = state.quantized()
    state.alpha.uniform_(0.6, 1.4)
    if state.beta is not None:
        state.beta.uniform_(0.6, 1.4)
    after = state.quantized()
    assert torch.equal(before.codes, after.codes)
    assert not all(torch.equal(before.fields[k], after.fields[k]) for k in before.fields)
    if state.grid.integer_zero:
        assert state.beta is None
        assert torch.equal(before.fields["zero_point"], after.fields["zero_point"])


@pytest.mark.parametrize("name", VECTORS)
def test_v_moves_to_other_vectors_of_the_table(name: str) -> None:
    state, gradient = make_state(name, shrink=1)
    state.shift = torch.zeros(state.v.shape)
    before, settings = state.quantized(), TuningSettings(steps=3, lr=0.2, tune_scales=False)
    for step in range(3):
        fused_step(state, gradient, torch.empty(gradient.shape), step, settings)
    after = state.quantized()
    assert after.problem() is None
    assert 0.05 < float((after.codes != before.codes).float().mean()) < 0.9
    assert float(((after.dequantize() - before.dequantize()) * gradient).sum()) < 0


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
    assert torch.allclose(chunked.shift, compiled.shift, atol=1e-5)
    # A fused multiply-add may turn a tie: a code in ten thousand.
    assert float((out_chunked != out_compiled).float().mean()) < 1e-3


def test_no_scale_tuning_leaves_scales_alone() -> None:
    state, gradient = make_state("Q4_1")
    fused_step(state, gradient, torch.empty(gradient.shape), 0, TuningSettings(steps=2, tune_scales=False))
    assert torch.equal(state.alpha, torch.ones_like(state.alpha))
    assert state.beta is not None
    assert torch.equal(state.beta, torch.ones_like(state.beta))


def test_rates_fall_to_zero_and_no_scale_moves_a_code_further_than_v() -> None:
    grid = get_grid("Q4_0")
    rates = [learning_rates(TuningSettings(steps=4), grid, step) for step in range(4)]
    first = V_TRAVEL / 4
    assert rates == [(first * left, first / 8 * left) for left in (1, 0.75, 0.5, 0.25)]
    assert learning_rates(TuningSettings(steps=4), get_grid("Q4_1"), 0) == (first, first / 15)
    assert learning_rates(TuningSettings(steps=4, lr=0.1, scale_lr=0.2), grid, 0) == (0.1, 0.2)
