"""Whole runs of `quantize` on tiny-llama: resumed ones have the same bytes, spoilt ones end as on the CPU."""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.models import change_weights, tiny_sizes, write_random, write_tiny_llama
from benchmarks.gpu.parts import Row
from signround_edge.demo import calibration_text_path
from signround_edge.errors import UserError
from signround_edge.files import sha256_of
from signround_edge.formats import get_grid
from signround_edge.progress import SILENT, Progress
from signround_edge.run_directory import RunDirectory
from signround_edge.schemes.scheme import parse_scheme
from signround_edge.tuning.block.sign_step import RoundingState, fused_step
from signround_edge.tuning.block.start import initial_scales
from signround_edge.tuning.cost.record import COSTS_FILE
from signround_edge.tuning.quantize import quantize
from signround_edge.tuning.settings import TuningSettings

_DOWN = "model.layers.1.mlp.down_proj.weight"


class _StoppedError(Exception):
    """Ends a run after some of its parts."""


@dataclass(frozen=True)
class _Model:
    """A model folder and its calibration text."""

    folder: Path
    text: Path

    @classmethod
    def write(cls, bench: Bench, parent: Path, blocks: int) -> _Model:
        """Blocks of tiny-llama, or random ones where it must be quick."""
        model, text = cls(parent / "model", parent / "text.txt"), calibration_text_path().read_bytes()
        model.text.write_bytes(text[:4096] if bench.options.tiny else text)
        if bench.options.tiny:
            write_random(model.folder, tiny_sizes(blocks).config())
        else:
            write_tiny_llama(model.folder, blocks)
        return model

    def quantize(
        self, out: Path, settings: TuningSettings, device: str, progress: Progress = SILENT, resume: bool = False
    ) -> RunDirectory:
        """To Q4_0 all over: what is outside the blocks is rounded on the CPU."""
        scheme = parse_scheme("gguf:q4_0").with_outside_types(None, "Q4_0")
        return quantize(self.folder, scheme, out, str(self.text), settings, device, resume, progress=progress)


def same_bytes(bench: Bench) -> Iterator[Row]:
    """Rows of the table "runs": the same run twice, and one that was stopped and resumed, file by file."""
    settings, blocks, stop_after = TuningSettings(steps=3, samples=16, batch_size=4), 5, 2
    if bench.options.tiny:
        settings, blocks = TuningSettings(steps=2, samples=2, seqlen=16, batch_size=1), 3
    device = bench.device.type

    def stop(done: int, _total: int) -> None:
        if done == stop_after:
            raise _StoppedError

    with tempfile.TemporaryDirectory() as temporary:
        whole, again, resumed = (Path(temporary) / name for name in ("whole", "again", "resumed"))
        model = _Model.write(bench, Path(temporary), blocks)
        for out in (whole, again):
            model.quantize(out, settings, device)
        with contextlib.suppress(_StoppedError):
            model.quantize(resumed, settings, device, replace(SILENT, parts=stop))
        model.quantize(resumed, settings, device, resume=True)
        for what, other in (("the same run twice", again), (f"stopped after {stop_after} parts, resumed", resumed)):
            expected, found = _digests(whole), _digests(other)
            differ = [name for name, digest in expected.items() if found.get(name) != digest]
            outcome = f"{len(differ)} of {len(expected)} files differ: {', '.join(differ)}"
            outcome = outcome if differ else f"all {len(expected)} files equal"
            yield {"table": "runs", "what": what, "outcome": outcome, "as_expected": "NO" if differ else "yes"}


def _digests(folder: Path) -> dict[str, str]:
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != COSTS_FILE]
    return {str(file.relative_to(folder)): sha256_of(file) for file in files}


def not_finite(bench: Bench) -> Iterator[Row]:
    """Rows of the table "runs": how runs on spoilt weights end, and a step by a gradient that is not finite."""
    spoilt: dict[str, Callable[[dict[str, Tensor]], object]] = {
        "a weight is NaN": lambda tensors: tensors[_DOWN][0, :1].fill_(math.nan),
        "activations overflow": lambda tensors: tensors.update({_DOWN: tensors[_DOWN].float().mul_(1e38)}),
        "a matrix of zeros": lambda tensors: tensors[_DOWN].zero_(),
    }
    devices = ("cpu", bench.device.type)
    for what, change in spoilt.items():
        with tempfile.TemporaryDirectory() as temporary:
            model = _Model.write(bench, Path(temporary), blocks=2)
            change_weights(model.folder, change)
            ends = [_end_of(model, Path(temporary) / f"run-{number}", name) for number, name in enumerate(devices)]
        yield _same_end(what, *ends)
    yield _same_end("a gradient is NaN", *(_codes_by_nan(torch.device(name)) for name in devices))


def _same_end(what: str, on_cpu: str, on_device: str) -> Row:
    outcome = on_cpu if on_cpu == on_device else f"CPU: {on_cpu}; device: {on_device}"
    return {"table": "runs", "what": what, "outcome": outcome, "as_expected": "yes" if on_cpu == on_device else "NO"}


def _end_of(model: _Model, out: Path, device: str) -> str:
    """How a run ends, in a line without the names of its folders."""
    try:
        run = model.quantize(out, TuningSettings(steps=1, samples=2, seqlen=16, batch_size=1), device)
    except (UserError, AssertionError, RuntimeError) as error:
        said = str(error).replace(str(model.folder), "MODEL").replace(str(out), "OUT").splitlines() or [""]
        return f"{type(error).__name__}: {said[0][:200]}"
    for name in run.names():
        if not bool(run.dequantized(name).isfinite().all()):
            return f"complete, but {name} is not finite"
    return "complete, all weights finite"


def _codes_by_nan(device: torch.device) -> str:
    """What becomes of a matrix by one step whose gradient is NaN in a row."""
    grid = get_grid("Q4_0")
    weight = torch.linspace(-1, 1, 4 * 64).view(4, 64).to(device)
    state = RoundingState.start(grid, weight, initial_scales(grid, weight, torch.ones(64, device=device), "absmax"))
    gradient = torch.ones_like(weight)
    gradient[1] = math.nan
    fused_step(state, gradient, torch.empty_like(weight), 0, TuningSettings(steps=1))
    found = state.quantized()
    lost = int((~found.dequantize().isfinite()).sum())
    return f"{found.problem() or 'codes and fields are valid'}, {lost} weights not finite"
