"""One tuning step taken apart: what is copied, forward, backward, the fused step; and its kernels.

The sections call what `tune_unit` calls, one after another, with the device idle between them. What a step takes when
nothing is between them is in `block`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu.bench import Bench, PreparedBlock
from benchmarks.gpu.parts import Row
from benchmarks.gpu.timing import Sections, median_seconds, timed
from signround_edge.model.decoder import set_weight, weight_of
from signround_edge.tuning.block.loss import loss_gradient
from signround_edge.tuning.block.sign_step import RoundingState, fused_step
from signround_edge.tuning.block.start import initial_scales
from signround_edge.tuning.calibration.block_call import Runner, compiled_runner

# Bytes of a weight that a fused step must at least read or write: u, V twice; gradient and ŵ besides.
_STATE_BYTES = 2 + 2 * 2
_KERNELS_SHOWN = 12


class Stepper:
    """A prepared block in the middle of its tuning, from the nearest codes of plain scales: neither changes a time."""

    def __init__(self, block: PreparedBlock) -> None:
        self.block = block
        self.states = {
            m.name: RoundingState.start(m.grid, m.exact, initial_scales(m.grid, m.exact, m.importance, "absmax"))
            for m in block.unit.matrices
        }
        dtype = block.dtype
        self.weights = {
            m.name: set_weight(m.module, weight_of(m.module).to(dtype, copy=True), True) for m in block.unit.matrices
        }
        self.index = block.batch

    def forward(self) -> Tensor:
        """The block's output f32 [n, seqlen, hidden], as the product's own unit computes it, inputs copied."""
        with self.block.autocast:
            return self.block.unit.forward(self.index).float()

    def backward(self, output: Tensor) -> None:
        """Gradients of all weights, targets copied."""
        output.backward(loss_gradient(self.block.unit, output.detach(), self.index))

    def update(self, step: int, compiled: bool | None = None) -> None:
        """The fused step of every matrix; `compiled`: as on this device unless given."""
        for name, weight in self.weights.items():
            self.update_one(name, step, compiled)
            weight.grad = None

    def update_one(self, name: str, step: int, compiled: bool | None = None) -> None:
        """The fused step of one matrix."""
        weight = self.weights[name]
        assert weight.grad is not None
        on_gpu = self.block.device.type == "cuda" if compiled is None else compiled
        fused_step(self.states[name], weight.grad, weight.data, step, self.block.settings, compiled=on_gpu)

    def step(self, number: int) -> None:
        """One whole step."""
        self.backward(self.forward())
        self.update(number)


def apart(bench: Bench, shape: str, name: str) -> Iterator[Row]:
    """Rows of the tables "steps" and "sign_steps"."""
    block = bench.block(shape, name)
    stepper, device = Stepper(block), bench.device
    steps = 3 if bench.options.tiny else 10
    times = Sections(device)
    call = block.shell.block_call(0, block.job.tokens[stepper.index], device)
    module = block.job.decoder.blocks[0]
    for step in range(steps):
        with times.section("arguments"):
            block.shell.block_call(0, block.job.tokens[stepper.index], device)
        with times.section("inputs"):
            inputs = block.batch_inputs()
        with times.section("forward"), block.autocast:
            output = call.run(module, inputs).float()
        with times.section("targets"):
            block.unit.target(stepper.index)
        with times.section("targets and gradient of the loss"):
            slope = loss_gradient(block.unit, output.detach(), stepper.index)
        with times.section("backward"):
            output.backward(slope)
        with times.section("update"):
            stepper.update(step)
    flops = bench.shape(shape).step_flops(len(stepper.index), block.job.tokens.shape[1])
    names = ("arguments", "inputs", "forward", "targets and gradient of the loss", "backward", "update")
    seconds = {section: times.median(section) for section in names}
    products_s = seconds["forward"] + seconds["backward"]
    yield {
        "table": "steps",
        "block": bench.shape(shape).name,
        "format": name,
        "dtype": str(block.dtype).removeprefix("torch."),
        "tokens": len(stepper.index) * block.job.tokens.shape[1],
        "step_tflop": flops / 1e12,
        "counted_over_formula": _counted_flops(stepper) / flops,
        "arguments_ms": 1e3 * seconds["arguments"],
        "inputs_ms": 1e3 * seconds["inputs"],
        "targets_ms": 1e3 * times.median("targets"),
        "loss_ms": 1e3 * (seconds["targets and gradient of the loss"] - times.median("targets")),
        "forward_ms": 1e3 * seconds["forward"],
        "backward_ms": 1e3 * seconds["backward"],
        "update_ms": 1e3 * seconds["update"],
        "sum_ms": 1e3 * sum(seconds.values()),
        "tflops": flops / products_s / 1e12,
        "first_update_s": times.first("update"),
    }
    yield from _updates(bench, stepper, bench.shape(shape).name, name)


def compiled_block(bench: Bench, shape: str, name: str) -> Iterator[Row]:
    """A row of the table "compiled_block": forward and backward pass as they are, and with `--compile-blocks`."""
    block = bench.block(shape, name)
    stepper, device = Stepper(block), bench.device
    call = block.shell.block_call(0, block.job.tokens[stepper.index], device)
    inputs, module = block.batch_inputs(), block.job.decoder.blocks[0]
    slope = torch.randn(inputs.shape, device=device)

    def passes(runner: Runner | None) -> None:
        with block.autocast:
            output = call.run(module, inputs, runner=runner).float()
        output.backward(slope)
        for weight in stepper.weights.values():
            weight.grad = None

    runner = compiled_runner("aot_eager" if bench.options.tiny else "inductor")
    compile_s = timed(lambda: passes(runner), device)
    plain_s, compiled_s = (median_seconds(functools.partial(passes, way), device, 10) for way in (None, runner))
    tflop = bench.shape(shape).step_flops(len(stepper.index), block.job.tokens.shape[1]) / 1e12
    yield {
        "table": "compiled_block",
        "block": bench.shape(shape).name,
        "format": name,
        "compile_s": compile_s,
        "plain_ms": 1e3 * plain_s,
        "compiled_ms": 1e3 * compiled_s,
        "compiled_over_plain": compiled_s / plain_s,
        "tflops": tflop / compiled_s,
    }


def _counted_flops(stepper: Stepper) -> int:
    """Of a forward and a backward pass, whose gradients stay; attention by plain products.

    Fused kernels compute some products again, and torch's counter knows not all of their forms.
    """
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        stepper.backward(stepper.forward())
    return int(counter.get_total_flops())


def _updates(bench: Bench, stepper: Stepper, shape: str, name: str) -> Iterator[Row]:
    """The fused step of each shape of matrix, compiled and not, by the gradients of the last backward pass."""
    of_shape: dict[tuple[int, ...], list[str]] = {}
    for matrix in stepper.block.unit.matrices:
        of_shape.setdefault(tuple(matrix.exact.shape), []).append(matrix.name)
    for (rows, cols), names in of_shape.items():
        width = _STATE_BYTES + 2 * stepper.weights[names[0]].element_size()
        ways = (True, False) if bench.device.type == "cuda" else (False,)
        calls = {compiled: functools.partial(stepper.update_one, names[0], 0, compiled) for compiled in ways}
        seconds = {compiled: median_seconds(call, bench.device, 5) for compiled, call in calls.items()}
        best = min(seconds.values())
        yield {
            "table": "sign_steps",
            "block": shape,
            "format": name,
            "what": f"{rows:,} × {cols:,}",
            "count": len(names),
            "compiled_ms": 1e3 * seconds[True] if True in ways else None,
            "eager_ms": 1e3 * seconds[False],
            "gb_s": rows * cols * width / best / 1e9,
        }


def kernels(bench: Bench, shape: str, name: str) -> Iterator[Row]:
    """Rows of the table "kernels": what a step launches, by the time it takes on the device."""
    block = bench.block(shape, name)
    stepper = Stepper(block)
    for step in range(2):
        stepper.step(step)
    steps, on_gpu = 3, bench.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    wall = median_seconds(lambda: stepper.step(2), bench.device, 3)
    with profile(activities=activities) as recorded:
        for _ in range(steps):
            stepper.step(2)
        if on_gpu:
            torch.cuda.synchronize()
    events = recorded.key_averages()
    own = [e for e in events if e.device_type.name == bench.device.type.upper() and not e.is_user_annotation]
    busy = {e.key: (e.self_device_time_total if on_gpu else e.self_cpu_time_total) / steps / 1e6 for e in own}
    counts = {e.key: e.count / steps for e in own}
    first = {"table": "kernels", "block": bench.shape(shape).name, "format": name}
    ranked = sorted(busy, key=lambda key: -busy[key])
    total = {"what": f"all {len(busy)} kinds", "count": sum(counts.values()), "ms": 1e3 * sum(busy.values())}
    yield {**first, **total, "of_step_percent": 100 * sum(busy.values()) / wall}
    for key in ranked[:_KERNELS_SHOWN]:
        share = 100 * busy[key] / wall
        yield {**first, "what": key[:100], "count": counts[key], "ms": 1e3 * busy[key], "of_step_percent": share}
