"""`python -m benchmarks.step_counts`: what a tuning step does to a GPU, on fake tensors of a block."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException

from benchmarks.fake_cuda import DEVICE, _backward, fake_cuda
from benchmarks.gpu.shapes import TINY_SHAPES
from benchmarks.step_counts import Counts, counted, counting
from signround_edge.tuning.calibration.activations import CPU
from signround_edge.tuning.settings import TuningSettings

SETTINGS = TuningSettings(steps=4, samples=8, seqlen=32, batch_size=4)
HIDDEN = 256  # of the tiny Llama
STATES = 4 * SETTINGS.batch_size * SETTINGS.seqlen * HIDDEN


def of_block(hidden_on: torch.device) -> dict[str, Counts]:
    return dict(counted(TINY_SHAPES["Llama-3-8B"], "Q4_0", hidden_on, SETTINGS))


def test_a_step_copies_nothing_and_waits_for_nothing_where_hidden_states_are_on_the_gpu() -> None:
    found = of_block(DEVICE)
    for what in ("step", "batch of a pass"):
        assert not found[what].to_device, what
        assert not found[what].to_host, what
        assert not found[what].waits, what
    assert found["step"].launches["sign step"] == 7
    assert found["step"].launches["mm"] == 7 + 7 + 4  # forward, to weights, and to what o, gate, up and down read
    assert found["step"].compiled.total() > 7
    assert dict(found["held-out batch"].waits) == {"_local_scalar_dense": 1}


def test_a_step_waits_for_nothing_where_hidden_states_are_in_pinned_memory_of_the_host() -> None:
    found = of_block(CPU)
    assert sum(found["step"].to_device) == 2 * STATES  # what enters the block, and what is to leave it
    assert found["step"].pageable == found["step"].host_bytes == 0
    assert not found["step"].waits
    one_pass = found["batch of a pass"]
    assert sum(one_pass.to_device) == sum(one_pass.to_host) == STATES
    assert dict(one_pass.waits) == {"copy to the host": 1}  # the last batch's: whoever reads the host's memory may


def test_what_would_be_waited_for_is_counted() -> None:
    with fake_cuda(), counting({}) as mode:
        values = torch.ones(4, device=DEVICE)
        values[torch.tensor([0, 2])]
        torch.ones(3).to(DEVICE)
        values.cpu()
        with pytest.raises(DataDependentOutputException):
            float(values.sum())
    counts = mode.counts
    assert (len(counts.to_device), counts.pageable, len(counts.to_host)) == (2, 2, 1)
    assert counts.waits == {"copy to the device": 2, "copy to the host": 1, "_local_scalar_dense": 1}


def test_gradients_found_node_by_node_are_those_of_autograd() -> None:
    torch.manual_seed(0)
    inputs, gradient = torch.randn(5, 4), torch.randn(5, 3)
    found = []
    for by_engine in (True, False):
        weight = torch.arange(12.0).view(3, 4).requires_grad_()
        once = inputs @ weight.T
        output = once.tanh() + once.bfloat16().float().square() * weight.sum()
        output.backward(gradient) if by_engine else _backward(output, gradient)
        found.append(weight.grad)
    assert found[0] is not None
    assert found[1] is not None
    assert torch.equal(found[0], found[1])
