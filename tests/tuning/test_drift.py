"""Correction of drift: least squares of what is missing, kept only where held-out samples gain."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from signround_edge.formats import get_grid
from signround_edge.schemes.roles import writes_to_stream
from signround_edge.tuning.block.drift import correct_drift
from signround_edge.tuning.block.unit import Matrix, Unit
from signround_edge.tuning.calibration.activations import equal_weights

OFF = torch.autocast("cpu", enabled=False)


def residual_unit(missing: Tensor, writes: bool = True) -> tuple[Unit, nn.Linear]:
    """x + W·f(x) for 24 training and 8 held-out samples; its exact output has `missing`·f(x) more."""
    generator = torch.Generator().manual_seed(3)
    module = nn.Linear(32, 16, bias=False)
    weight = module.weight.detach().clone()
    stream = torch.randn(32, 64, 16, generator=generator)
    inputs = torch.tanh(stream @ torch.randn(16, 32, generator=generator))
    target = stream + inputs @ (weight + missing).T + 0.01 * torch.randn(32, 64, 16, generator=generator)
    matrix = Matrix("down", module, get_grid("Q4_0"), weight, torch.ones(32), writes)
    samples = torch.arange(32)
    unit = Unit(
        [matrix],
        lambda index: stream[index] + module(inputs[index]),
        lambda index: target[index],
        equal_weights,
        samples[:24],
        samples[24:],
        module,
    )
    return unit, module


def loss_of(unit: Unit) -> float:
    with torch.no_grad():
        return float((unit.forward(unit.held_out) - unit.target(unit.held_out)).square().mean())


def test_what_is_missing_is_found_and_installed() -> None:
    missing = 0.1 * torch.randn(16, 32, generator=torch.Generator().manual_seed(4))
    unit, module = residual_unit(missing)
    weight, before = module.weight.detach().clone(), loss_of(unit)
    found = correct_drift(unit, 8, OFF, lambda: loss_of(unit))
    assert loss_of(unit) == found.loss < 0.5 * before
    assert torch.equal(found.weights["down"], module.weight.detach())
    change = found.weights["down"] - weight
    assert float((change * missing).sum()) > 0.25 * float(missing.square().sum())  # the ridge shortens it


def test_the_solution_is_that_of_the_ridge() -> None:
    unit, _ = residual_unit(0.1 * torch.randn(16, 32, generator=torch.Generator().manual_seed(4)))
    matrix = unit.matrices[0]
    inputs: list[Tensor] = []
    hook = matrix.module.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        errors = (unit.target(unit.train) - unit.forward(unit.train)).flatten(0, 1).double()
    hook.remove()
    x = inputs[0].flatten(0, 1).double()
    ridge = x.square().sum() / x.shape[1]
    expected = torch.linalg.lstsq(
        torch.cat([x, ridge.sqrt() * torch.eye(32, dtype=torch.float64)]),
        torch.cat([errors, torch.zeros(32, 16, dtype=torch.float64)]),
    ).solution.T
    found = correct_drift(unit, 8, OFF, lambda: loss_of(unit))
    torch.testing.assert_close((found.weights["down"] - matrix.weight).double(), expected, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(found.hessians["down"].double(), x.T @ x, atol=1e-3, rtol=1e-5)


def test_a_correction_that_held_out_samples_do_not_confirm_is_taken_back() -> None:
    unit, module = residual_unit(0.1 * torch.randn(16, 32))
    weight = module.weight.detach().clone()
    losses = iter([1.0, 1.0])  # before, and with the correction
    found = correct_drift(unit, 8, OFF, lambda: next(losses))
    assert (found.weights, found.loss) == ({}, 1.0)
    assert torch.equal(module.weight, weight)


@pytest.mark.parametrize("value", [0.0, torch.nan])
def test_inputs_that_say_nothing_change_nothing(value: float) -> None:
    unit, module = residual_unit(torch.zeros(16, 32))
    weight = module.weight.detach().clone()
    silent = replace(unit, forward=lambda index: module(torch.full((len(index), 64, 32), value)))
    found = correct_drift(silent, 8, OFF, lambda: 1.0)
    assert (found.weights, found.loss) == ({}, 1.0)
    assert torch.equal(module.weight, weight)


def test_matrices_that_do_not_write_to_the_stream_are_left_alone() -> None:
    unit, module = residual_unit(torch.ones(16, 32), writes=False)
    weight = module.weight.detach().clone()
    found = correct_drift(unit, 8, OFF, lambda: loss_of(unit))
    assert (found.weights, found.loss) == ({}, loss_of(unit))
    assert torch.equal(module.weight, weight)


class TwoWriters(nn.Module):
    """x + out·tanh(first·x), and a feed-forward part upon it, listed in another order than they are called."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up, self.out, self.first = (nn.Linear(16, 16, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.out(torch.tanh(self.first(x)))
        return x + self.down(torch.relu(self.up(x)))


@pytest.mark.parametrize("writers", [("out", "down"), ("out",), ("down",), ()])
def test_hessians_are_of_the_inputs_among_the_corrected_weights(writers: tuple[str, ...]) -> None:
    torch.manual_seed(5)
    block, stream = TwoWriters(), torch.randn(32, 8, 16)
    with torch.no_grad():
        target = block(stream) + 0.5 * torch.tanh(stream.flip(-1))
    matrices = [
        Matrix(n, m, get_grid("Q4_0"), m.weight.detach().clone(), torch.ones(16), n in writers)
        for n, m in block.named_children()
    ]
    samples = torch.arange(32)
    unit = Unit(
        matrices,
        lambda index: block(stream[index]),
        lambda index: target[index],
        equal_weights,
        samples[:24],
        samples[24:],
        block,
    )
    inputs: dict[str, Tensor] = {}
    found = correct_drift(unit, 8, OFF, lambda: loss_of(unit))
    assert tuple(found.weights) == writers
    for name, module in block.named_children():
        module.register_forward_pre_hook(lambda _, args, n=name: inputs.update({n: args[0].detach().flatten(0, 1)}))
    with torch.no_grad():
        block(stream[:24])
    assert found.hessians.keys() == inputs.keys()
    for name, x in inputs.items():
        torch.testing.assert_close(found.hessians[name], x.T @ x, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "model_type", "expected"),
    [
        ("model.layers.3.self_attn.o_proj.weight", "llama", True),
        ("model.layers.3.mlp.down_proj.weight", "llama", True),
        ("model.layers.3.self_attn.q_proj.weight", "llama", False),
        ("model.layers.3.mlp.up_proj.weight", "llama", False),
        ("transformer.h.0.attn.c_proj.weight", "gpt2", True),
        ("transformer.h.0.mlp.c_proj.weight", "gpt2", True),
        ("gpt_neox.layers.0.attention.dense.weight", "gpt_neox", True),
        ("gpt_neox.layers.0.mlp.dense_4h_to_h.weight", "gpt_neox", True),
        ("model.layers.0.mlp.experts.5.down_proj.weight", "qwen3_moe", False),
    ],
)
def test_output_and_down_projections_write_to_the_stream(name: str, model_type: str, expected: bool) -> None:
    assert writes_to_stream(name, model_type) is expected
