"""Stand-ins: a matrix made of their rows says which rows it is made of, and one with changed values that it is none."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, PretrainedConfig

from exporters.onnx.bindings import Binding
from exporters.onnx.routes.stand_ins import Held, StandIns, without_copies
from signround_edge.run_directory import RunDirectory
from tests.exporters.onnx.conftest import BASE

UP, GATE, DOWN = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("up", "gate", "down"))


@pytest.fixture(scope="module")
def stand_ins(make_random_run: Callable[[PretrainedConfig, str], RunDirectory]) -> StandIns:
    return StandIns(make_random_run(LlamaConfig(**{**BASE, "num_hidden_layers": 1}), "onnx:w4g32"))


def test_a_stand_in_costs_a_column_and_no_two_rows_are_equal(stand_ins: StandIns) -> None:
    tensors = [stand_ins.tensor(name) for name in stand_ins.names]
    assert all(tensor.untyped_storage().nbytes() == 4 * len(tensor) for tensor in tensors)
    rows = torch.cat([tensor[:, 0] for tensor in tensors])
    assert len(rows.unique()) == len(rows)
    assert bool(rows.isfinite().all())


def test_whole_stacked_and_transposed_parameters_are_found(stand_ins: StandIns) -> None:
    up, gate = stand_ins.tensor(UP), stand_ins.tensor(GATE)
    assert stand_ins.find(up.numpy()) == Held((UP,), (), False)
    assert stand_ins.find(up.T.numpy()) == Held((UP,), (), True)
    assert stand_ins.find(torch.cat([gate, up]).T.numpy()) == Held((GATE, UP), (), True)
    interleaved = torch.stack([gate, up], dim=1).reshape(-1, 256)
    held = stand_ins.find(interleaved.numpy())
    assert held is not None
    assert held.parameters == (GATE, UP)
    assert held.rows[:3] == ((0, 1), (512, 513), (1, 2))


@given(rows=st.lists(st.integers(0, 1023), min_size=1, max_size=40))
def test_rows_in_any_order_are_named_so_that_they_can_be_taken_again(stand_ins: StandIns, rows: list[int]) -> None:
    stacked = torch.cat([stand_ins.tensor(GATE), stand_ins.tensor(UP)])[rows]
    held = stand_ins.find(stacked.numpy())
    assert held is not None
    again = torch.cat([stand_ins.tensor(name) for name in held.parameters])
    assert torch.equal(torch.cat([again[start:stop] for start, stop in held.rows]), stacked)


def test_changed_values_and_parts_of_rows_are_no_stand_ins(stand_ins: StandIns) -> None:
    up = stand_ins.tensor(UP)
    assert stand_ins.find((up * 1.5 + 100).numpy()) is None
    assert stand_ins.find(up[:, :128].numpy()) is None
    assert stand_ins.find(torch.cat([up, stand_ins.tensor(DOWN).T]).numpy()) is None
    changed = up.clone()
    changed[3, 5] *= 2
    assert stand_ins.find(changed.numpy()) is None


def test_a_stacked_matrix_takes_no_memory_of_its_own(stand_ins: StandIns) -> None:
    stacked = torch.cat([stand_ins.tensor(GATE), stand_ins.tensor(UP)])
    for tensor in (stacked, stacked.T):
        small = without_copies(tensor)
        assert torch.equal(small, tensor)
        assert small.untyped_storage().nbytes() == 4 * 1024
    weights = torch.randn(4, 4)
    assert without_copies(weights) is weights


def test_rows_and_function_survive_the_sidecar() -> None:
    binding = Binding("/a/MatMul", "MatMul", (UP, GATE), {"weight": "a"}, True, rows=((3, 5), (0, 1)), function="1 + x")
    assert Binding.from_json(binding.to_json()) == binding
    assert np.array_equal(Binding.from_json(binding.to_json()).rows, [(3, 5), (0, 1)])
