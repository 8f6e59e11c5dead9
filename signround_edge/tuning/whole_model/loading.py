"""The whole-model stage's way in and out: from a run's parts to a model in memory, and back to parts."""

from __future__ import annotations

import math
from dataclasses import asdict

import torch
from torch import Tensor

from signround_edge.formats import QuantizedTensor
from signround_edge.manifest import OUTSIDE, TensorEntry
from signround_edge.model.decoder import set_tensor
from signround_edge.tuning.block.compute import compute_context, compute_dtype
from signround_edge.tuning.calibration.activations import CPU
from signround_edge.tuning.calibration.shell import Shell
from signround_edge.tuning.job import Job
from signround_edge.tuning.outside import embed, frozen, load_outside
from signround_edge.tuning.whole_model.divergence import TopProbabilities
from signround_edge.tuning.whole_model.stage import TOKENS_AT_ONCE, WholeModel, tune_whole_model
from signround_edge.tuning.whole_model.tunables import BYTES_A_WEIGHT, FloatShift, Tunable, TunedMatrix


def revise_whole_model(job: Job, shell: Shell, exact: Tensor) -> None:
    """Tune all parts together, and write each anew.

    Args:
        exact: what leaves the exact last block, f32 [samples, seqlen, hidden].
    """
    model = _load(job, shell, exact)
    train, held_out = job.split()
    batches = job.batches(len(job.decoder.blocks), train, job.settings.whole_model_batch_size)
    tuned, report = tune_whole_model(model, job.settings, batches, held_out, job.progress)
    parts = ((part, _revised(job, part, tuned)) for part in job.plan.parts)
    job.run.write_whole_model(parts, asdict(report))
    job.progress.line(f"whole model: {report}")


def _load(job: Job, shell: Shell, exact: Tensor) -> WholeModel:
    decoder, device = job.decoder, job.device
    tunables: dict[str, Tunable] = {}
    grids = [job.grid(t.name) for t in job.plan.tensors if t.format is not None and t.part != OUTSIDE]
    dtype, home = compute_dtype(job.settings, grids, device), _home(job)
    parameters = dict(decoder.model.named_parameters())  # stored buffers choose, and have no gradient
    for entry in job.plan.tensors:
        if entry.format is not None and entry.part != OUTSIDE:
            tensor = job.run.quantized(entry.name).to(device)
            tunables[entry.name] = TunedMatrix(tensor, entry.transposed, _original(job, entry), dtype, home)
        elif len(entry.shape) == 1 and entry.name in parameters:
            tunables[entry.name] = FloatShift(job.run.float_tensor(entry.name).to(device))
    for module in decoder.model.modules():
        module._buffers.update({k: None if b is None else b.to(device) for k, b in module._buffers.items()})
    load_outside(job, lambda name: job.weights.tensor(name).float(), device)
    with torch.no_grad():
        positions = exact.flatten(0, 1).split(TOKENS_AT_ONCE)
        exact_probabilities = TopProbabilities.of((shell.logits(part.to(device)) for part in positions), CPU)
    load_outside(job, job.run.dequantized, device)
    inputs = embed(job, shell).hidden.cpu()
    for entry in job.plan.tensors:  # what stays as it is within the blocks; the rest comes with each block
        if entry.part != OUTSIDE and entry.name not in tunables:
            set_tensor(decoder.model, entry.name, frozen(job.run.dequantized(entry.name).to(device)))
    autocast = compute_context(job.settings, grids, device)
    return WholeModel(decoder, shell, job.tokens, inputs, exact_probabilities, tunables, autocast, device)


def _home(job: Job) -> torch.device:
    """Where codes and positions are between steps: on a GPU if half of its free memory holds them, else the host."""
    if job.device.type != "cuda":
        return job.device
    tuned = sum(math.prod(t.shape) for t in job.plan.tensors if t.format is not None and t.part != OUTSIDE)
    return job.device if BYTES_A_WEIGHT * tuned <= torch.cuda.mem_get_info(job.device)[0] / 2 else CPU


def _original(job: Job, entry: TensorEntry) -> Tensor | None:
    """The full-precision weight f32 [out, in], transformed, of a matrix whose codes the whole-model stage moves."""
    if job.settings.whole_model_code_lr == 0:
        return None
    weight = job.weights.tensor(entry.name).float()
    weight = job.run.channel_scales(entry.name).apply(weight.T.contiguous() if entry.transposed else weight)
    return weight.to(job.device)


def _revised(job: Job, part: str, tuned: dict[str, Tensor | QuantizedTensor]) -> dict[str, Tensor | QuantizedTensor]:
    """A part with what the whole-model stage has tuned."""
    tensors: dict[str, Tensor | QuantizedTensor] = {}
    for entry in job.plan.of_part(part):
        if entry.name in tuned:
            tensors[entry.name] = tuned[entry.name]
        elif entry.format is not None:
            tensors[entry.name] = job.run.quantized(entry.name)
        else:
            tensors[entry.name] = job.run.float_tensor(entry.name)
    return tensors
