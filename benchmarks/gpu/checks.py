"""Codes and scale fields on the CPU against those on the device, from the same inputs, one stage of tuning at a time.

Scale search, GPTQ's codes and the sign step get the very same tensors on both sides, so that each answers for itself;
`tuned` goes the whole way of `tune_unit` on a block of tiny-llama. Nothing here fails: how far sums in another order
carry is what these rows are to say.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal
from unittest import mock

import torch
import torch._dynamo
from torch import Tensor

from benchmarks.gpu.bench import Bench, PreparedBlock, prepare
from benchmarks.gpu.difference import EQUAL, Difference
from benchmarks.gpu.parts import Row
from signround_edge.demo import calibration_text_path, tiny_llama_path
from signround_edge.formats import GRIDS, Grid, QuantizedTensor, get_grid
from signround_edge.formats.grid import Fields
from signround_edge.model.source import SourceModel
from signround_edge.model.tokenizer import load_tokenizer
from signround_edge.tuning.block.drift import correct_drift
from signround_edge.tuning.block.gptq import DAMPING, compensated
from signround_edge.tuning.block.sign_step import RoundingState, fused_step
from signround_edge.tuning.block.start import find_start, initial_scales
from signround_edge.tuning.block.statistics import v_histogram
from signround_edge.tuning.block.tune import tune_unit
from signround_edge.tuning.block.unit import Matrix
from signround_edge.tuning.calibration.activations import CPU
from signround_edge.tuning.calibration.text import calibration_tokens
from signround_edge.tuning.settings import TuningSettings

# One of each kind of arithmetic, where there is no time for all grids.
KINDS = ("Q4_0", "Q4_K", "IQ4_XS", "w4g128", "Q4_1", "Q8_0", "Q3_K", "Q2_K", "IQ4_NL", "w4g32-asym", "w2g64", "w8g128")
_STEPS = 3


@dataclass(frozen=True)
class _Pair:
    """A block of tiny-llama on the CPU and on the device, from the same inputs, targets and E[x²]."""

    cpu: PreparedBlock
    device: PreparedBlock

    @classmethod
    def open(cls, bench: Bench, settings: TuningSettings) -> _Pair:
        folder = tiny_llama_path()
        tokenizer, text = load_tokenizer(folder), str(calibration_text_path())
        tokens = calibration_tokens(text, tokenizer, settings.samples, settings.seqlen)
        source = SourceModel.open(folder)
        cpu = prepare(source, tokens, settings, CPU)
        importance = {m.name: m.importance for m in cpu.unit.matrices}
        device = prepare(source, tokens, settings, bench.device, importance)
        unit = device.unit
        shared = replace(unit, target=lambda samples: cpu.target[samples].to(bench.device))
        return cls(cpu, replace(device, unit=shared, target=cpu.target))

    def matrices(self, bench: Bench) -> list[tuple[Matrix, Matrix]]:
        """On the CPU and on the device: all of the block, or keys, output and down projection, or keys alone."""
        pairs = list(zip(self.cpu.unit.matrices, self.device.unit.matrices, strict=True))
        chosen = [1] if bench.options.tiny else [1, 3, 6] if bench.options.quick else range(len(pairs))
        return [pairs[index] for index in chosen]

    def both(self) -> tuple[PreparedBlock, PreparedBlock]:
        return self.cpu, self.device


def _settings(bench: Bench) -> TuningSettings:
    settings = TuningSettings(steps=_STEPS, checks=1, compute_dtype="float32", samples=16, seqlen=128)
    return replace(settings, samples=4, seqlen=16, batch_size=2) if bench.options.tiny else settings


def search(bench: Bench) -> Iterator[Row]:
    """Rows of the table "search": scale search alone, as with --steps 0, on every grid."""
    pairs = _Pair.open(bench, _settings(bench)).matrices(bench)
    for grid in _all_grids(bench):
        found, errors = [], [0.0, 0.0]
        for both in pairs:
            tensors = [
                grid.quantize(m.exact, initial_scales(grid, m.exact, m.importance, "search")).to(CPU) for m in both
            ]
            found.append(Difference.between(*tensors))
            for side, tensor in enumerate(tensors):
                errors[side] += _weighted_error(both[0], tensor)
        worst = Difference.of_all(found)
        row = {"table": "search", "format": grid.name, **worst.row()}
        yield {**row, "why": worst.why(errors[1] / errors[0] - 1)}


def _weighted_error(matrix: Matrix, tensor: QuantizedTensor) -> float:
    """Σ E[x²]·(w − ŵ)², both on the CPU."""
    return float(((matrix.exact - tensor.dequantize()).square() * matrix.importance).double().sum())


def gptq(bench: Bench) -> Iterator[Row]:
    """Rows of the table "gptq": its codes from the same weight, scales and hessian, with each damping, on every grid.

    The first row says how far the hessian itself, summed up on the device, is from the CPU's.
    """
    pair = _Pair.open(bench, _settings(bench))
    matrix, on_device = pair.cpu.unit.matrices[3], pair.device.unit.matrices[3]
    hessians = [
        correct_drift(block.unit, block.settings.batch_size, block.autocast, lambda: 0.0, correct=False).hessians
        for block in pair.both()
    ]
    hessian, other = (found[matrix.name].to(CPU) for found in hessians)
    apart = float((hessian - other).norm() / hessian.norm())
    yield {"table": "gptq", "format": "hessian", "why": f"‖H − H of the device‖ / ‖H‖ = {apart:.1e}"}
    for grid in _all_grids(bench):
        fields = grid.store(initial_scales(grid, matrix.exact, matrix.importance, "search"))
        for damping in DAMPING:
            moved = {name: field.to(bench.device) for name, field in fields.items()}
            rounded = [
                compensated(matrix.exact, hessian, grid, fields, damping),
                compensated(on_device.exact, hessian.to(bench.device), grid, moved, damping).to(CPU),
            ]
            tensors = [_nearest(grid, weight, fields) for weight in rounded]
            errors = [_output_error(matrix.exact - tensor.dequantize(), hessian) for tensor in tensors]
            found = Difference.between(*tensors)
            row = {"table": "gptq", "format": grid.name, "damping": damping, **found.row()}
            yield {**row, "why": found.why(errors[1] / errors[0] - 1)}
            if grid.group > 1:
                continue
            with mock.patch("signround_edge.tuning.block.gptq.has_triton", return_value=False):
                by_loop = compensated(on_device.exact, hessian.to(bench.device), grid, moved, damping).to(CPU)
            loop = _nearest(grid, by_loop, fields)
            error = _output_error(matrix.exact - loop.dequantize(), hessian)
            found = Difference.between(loop, tensors[1])
            row = {"table": "gptq", "format": f"{grid.name} by the loop", "damping": damping, **found.row()}
            yield {**row, "why": found.why(errors[1] / error - 1)}


def _nearest(grid: Grid, weight: Tensor, fields: Fields) -> QuantizedTensor:
    return grid.pack_tensor(grid.round_codes(grid.blocked(weight), fields), fields)


def _output_error(change: Tensor, hessian: Tensor) -> float:
    """tr(ΔW·H·ΔWᵀ)."""
    return float(((change @ hessian) * change).double().sum())


def sign_step(bench: Bench) -> Iterator[Row]:
    """Rows of the table "sign_step": some steps from the same state by the same gradients, not compiled."""
    for grid in _all_grids(bench):
        state, gradients = _state(grid, rows=16)
        yield {"table": "sign_step", "format": grid.name, **_steps_apart(state, gradients, CPU, bench.device, False)}
    yield _counts(bench)


def compiled(bench: Bench) -> Iterator[Row]:
    """Rows of the table "compiled": the same with the step compiled, against the step that is not, on the device."""
    for name in _grids(bench, quick=4):
        torch._dynamo.reset()
        state, gradients = _state(get_grid(name), rows=16)
        found = _steps_apart(state, gradients, bench.device, bench.device, True)
        yield {"table": "compiled", "format": name, **found}


def _all_grids(bench: Bench) -> list[Grid]:
    return [get_grid(name) for name in (KINDS if bench.options.tiny else GRIDS)]


def _grids(bench: Bench, quick: int) -> tuple[str, ...]:
    """Of `KINDS`: one, some or all."""
    return KINDS[:1] if bench.options.tiny else KINDS[:quick] if bench.options.quick else KINDS


def _state(grid: Grid, rows: int) -> tuple[RoundingState, list[Tensor]]:
    """A state on the CPU with V away from its start, and gradients bf16."""
    generator = torch.Generator().manual_seed(3)
    shape = rows, 2 * max(grid.row_multiple, 64)
    weight = torch.randn(shape, generator=generator)
    scales = initial_scales(grid, weight, torch.ones(shape[1]), "search")
    state = RoundingState.start(grid, weight, scales)
    state.shift = torch.empty(state.v.shape).uniform_(-0.4, 0.4, generator=generator)
    return state, [torch.randn(shape, generator=generator).bfloat16() for _ in range(_STEPS)]


def _steps_apart(
    state: RoundingState, gradients: list[Tensor], one: torch.device, other: torch.device, compile_other: bool
) -> Row:
    """What differs after some steps between two devices, or two ways to compute on one."""
    settings, ends = TuningSettings(steps=_STEPS), []
    for device, compiled_step in ((one, False), (other, compile_other)):
        moved, out = _on_device(state, device), torch.empty_like(gradients[0], device=device)
        for step, gradient in enumerate(gradients):
            fused_step(moved, gradient.to(device), out, step, settings, compiled=compiled_step)
        ends.append((moved, out.to(CPU)))
    (first, out), (second, other_out) = ends
    kept = second.quantized().to(CPU)
    found = Difference.between(first.quantized().to(CPU), kept)
    off_grid = 100 * float((other_out != kept.dequantize().to(other_out.dtype)).float().mean())
    why = EQUAL if torch.equal(out, other_out) else "products and sums rounded otherwise turn signs near 0"
    return {
        **found.row(),
        "v_apart": float((first.shift.to(CPU) - second.shift.to(CPU)).abs().max()),
        "weights_percent": 100 * float((out != other_out).float().mean()),
        "off_grid_percent": off_grid,
        "why": "WRONG: a step leaves weights that are not those of codes and scales" if off_grid else why,
    }


def _on_device(state: RoundingState, device: torch.device) -> RoundingState:
    """A copy, so that the state itself stays as it is."""

    def copied(tensor: Tensor) -> Tensor:
        return tensor.to(device, copy=True)

    return replace(
        state,
        initial=state.initial.map(copied),
        positions=None if state.positions is None else copied(state.positions),
        weights=None if state.weights is None else copied(state.weights),
        v=copied(state.v),
        alpha=copied(state.alpha),
        beta=None if state.beta is None else copied(state.beta),
    )


def _counts(bench: Bench) -> Row:
    """Whether the counts of V's histogram are right where there are more values than f32 can count one by one."""
    rows = 1 if bench.options.tiny else 1 << 13
    grid, weight = get_grid("Q4_0"), torch.ones(rows, 4096, device=bench.device)
    state = RoundingState.start(grid, weight, initial_scales(grid, weight, torch.ones(4096), "absmax"))
    lost = weight.numel() - int(v_histogram(state).sum())
    why = "all values counted" if lost == 0 else f"WRONG: {lost:,} of {weight.numel():,} values of V lost in f32 counts"
    return {"table": "sign_step", "format": "V's histogram", "why": why}


def tuned(bench: Bench) -> Iterator[Row]:
    """Rows of the table "tuned": start and end of `tune_unit` on two matrices of a block, in f32 and in "auto"."""
    pair = _Pair.open(bench, _settings(bench))
    chosen = _grids(bench, quick=6)
    every = chosen if bench.options.quick or bench.options.tiny else GRIDS
    plan: tuple[tuple[Literal["float32", "auto"], Iterable[str]], ...] = (("float32", every), ("auto", chosen))
    for dtype, names in plan:
        for name in names:
            both = [
                replaced.with_settings(replace(replaced.settings, compute_dtype=dtype))
                for replaced in (_two_matrices(block).on_grid(name) for block in pair.both())
            ]
            starts, ends, losses = zip(*(_tuned(block) for block in both), strict=True)
            start, end = (
                Difference.of_all(Difference.between(found[0][m].to(CPU), found[1][m]) for m in found[0])
                for found in (starts, ends)
            )
            kinds = [str(block.dtype).removeprefix("torch.") for block in both]
            yield {
                "table": "tuned",
                "format": name,
                "dtype": f"{dtype}: {kinds[0]} on the CPU, {kinds[1]} on {bench.device.type}",
                "start_codes_percent": start.codes_percent,
                **end.row(),
                **{f"{key}_cpu": value for key, value in losses[0].items()},
                **{f"{key}_device": value for key, value in losses[1].items()},
                "why": EQUAL if end.why(0) == EQUAL else "other dtypes" if kinds[0] != kinds[1] else "other sums",
            }


def _two_matrices(block: PreparedBlock) -> PreparedBlock:
    """One that reads the block's input, and one that writes into the residual stream."""
    return block.with_matrices([block.unit.matrices[1], block.unit.matrices[3]])


def _tuned(
    block: PreparedBlock,
) -> tuple[dict[str, QuantizedTensor], dict[str, QuantizedTensor], dict[str, float]]:
    """Codes at the start and at the end, and the held-out losses; the step is not compiled."""
    block.restore()
    with torch.compiler.set_stance("force_eager"):
        start = find_start(block.unit, block.settings, block.autocast)
        block.restore()
        end = tune_unit(block.unit, block.settings, block.job.batches(0, block.unit.train), block.device)
    block.restore()
    report = end.report
    losses = {"rounded": report.rounded, "start": report.start, "tuned": report.tuned}
    return start.tensors, end.tensors, losses
