"""The whole-model stage's way in and out: from a run's parts to a model in memory, and back to parts."""

from __future__ import annotations

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
from signround_edge.tuning.whole_model.tunables import FloatShift, Tunable, TunedMatrix


def revise_whole_model(job: Job, shell: Shell, exact: Tensor) -> None:
    """Tune all parts together, and write each anew.

    Args:
        exact: what leaves the exact last block of this rank's own samples, f32 [samples, seqlen, hidden].
    """
    job.ranks.of_first(None)  # by then it has written all parts
    model = _load(job, shell, exact)
    batches = job.own_batches(len(job.decoder.blocks), job.settings.whole_model_batch_size)
    tuned, report = tune_whole_model(model, job.settings, batches, job.own_split()[1], job.progress)
    parts = ((part, _revised(job, part, model, tuned)) for part in job.plan.parts)
    if job.ranks.first:
        job.run.write_whole_model(parts, asdict(report))
        job.progress.line(f"whole model: {report}")
    else:
        for _ in parts:  # which sends this rank's own to the first
            pass


def _load(job: Job, shell: Shell, exact: Tensor) -> WholeModel:
    decoder, device = job.decoder, job.device
    tunables: dict[str, Tunable] = {}
    dtypes: dict[str, torch.dtype] = {}
    grids = [job.grid(t.name) for t in job.plan.tensors if t.format is not None and t.part != OUTSIDE]
    dtype, home = compute_dtype(job.settings, grids, device), job.codes_on
    parameters = dict(decoder.model.named_parameters())  # stored buffers choose, and have no gradient
    for entry in job.plan.tensors:
        is_own = job.ranks.owns(len(dtypes))
        if entry.format is not None and entry.part != OUTSIDE:
            dtypes[entry.name] = dtype
            if is_own:
                tensor = job.run.quantized(entry.name).to(device)
                tunables[entry.name] = TunedMatrix(tensor, entry.transposed, _original(job, entry), dtype, home)
        elif len(entry.shape) == 1 and entry.name in parameters:
            dtypes[entry.name] = torch.float32
            if is_own:
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
        if entry.part != OUTSIDE and entry.name not in dtypes:
            set_tensor(decoder.model, entry.name, frozen(job.run.dequantized(entry.name).to(device)))
    autocast = compute_context(job.settings, grids, device)
    return WholeModel(
        decoder, shell, job.own_tokens, inputs, exact_probabilities, dtypes, tunables, autocast, device, job.ranks
    )


def _original(job: Job, entry: TensorEntry) -> Tensor | None:
    """The full-precision weight f32 [out, in], transformed, of a matrix whose codes the whole-model stage moves."""
    if job.settings.whole_model_code_lr == 0:
        return None
    weight = job.weights.tensor(entry.name).float()
    weight = job.run.channel_scales(entry.name).apply(weight.T.contiguous() if entry.transposed else weight)
    return weight.to(job.device)


def _revised(
    job: Job, part: str, model: WholeModel, tuned: dict[str, Tensor | QuantizedTensor]
) -> dict[str, Tensor | QuantizedTensor]:
    """A part with what the whole-model stage has tuned, on the first rank; the others send what is theirs."""
    tensors: dict[str, Tensor | QuantizedTensor] = {}
    for entry in job.plan.of_part(part):
        if entry.name in model.numbers:
            tensors[entry.name] = _of_owner(job, entry, model.numbers[entry.name], tuned.get(entry.name))
        elif job.ranks.first:
            stored = job.run.float_tensor if entry.format is None else job.run.quantized
            tensors[entry.name] = stored(entry.name)
    return tensors


def _of_owner(
    job: Job, entry: TensorEntry, number: int, own: Tensor | QuantizedTensor | None
) -> Tensor | QuantizedTensor:
    """A tuned tensor from the rank that owns it."""
    parts: dict[str, Tensor | None] | None = None
    if own is not None:
        own = own.to(job.device)
        parts = {"": own} if isinstance(own, Tensor) else {"": own.codes, **own.fields}
    sent = job.ranks.of_owner(number, parts, job.device)
    found = {name: tensor for name, tensor in sent.items() if tensor is not None}
    whole = found.pop("")
    return whole if entry.format is None else QuantizedTensor(job.grid(entry.name), whole, found)
