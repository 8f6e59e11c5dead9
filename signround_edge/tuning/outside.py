"""What is outside the decoder blocks: the embedding before them, norm and output head behind them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from signround_edge.formats import QuantizedTensor
from signround_edge.manifest import OUTSIDE
from signround_edge.model.decoder import load_parameters, set_parameter, set_weight, unload_parameters, weight_of
from signround_edge.tuning.block.start import initial_scales
from signround_edge.tuning.block.transforming import Transforming
from signround_edge.tuning.calibration.activations import Shell, block_returns_tuple, equal_weights
from signround_edge.tuning.calibration.input_moments import SecondMoments
from signround_edge.tuning.job import CPU, Job


def open_shell(job: Job) -> Shell:
    """The model without its blocks: all that is outside them but the head is loaded, as the source stores it."""
    decoder = job.decoder
    inside = set(decoder.blocks.modules())
    for name, module in decoder.model.named_modules():
        if module not in inside and module is not decoder.head:
            _load_own(job, module, name)
    load_parameters(decoder.blocks[0], decoder.block_prefix(0), job.source, CPU, decoder.base_prefix)
    shell = Shell(decoder, block_returns_tuple(decoder, job.tokens[:1, :2]))
    unload_parameters(decoder.blocks[0])
    return shell


def embed(job: Job, shell: Shell) -> Tensor:
    """What enters block 0 for all samples, f32 [samples, seqlen, hidden], by the embedding that is loaded."""
    return torch.cat([shell.embed(part) for part in job.tokens.split(job.settings.batch_size)])


def quantize_embedding(job: Job) -> QuantizedTensor | None:
    """Round the token embedding and install it; None where it stays in floats."""
    name = job.plan.embedding
    if not job.run.is_quantized(name):
        return None
    grid, weight = job.grid(name), weight_of(job.decoder.embedding)
    importance = job.importance.given.get(name, torch.ones(weight.shape[1]))
    tensor = grid.quantize(weight, initial_scales(grid, weight, importance, "search"))
    set_weight(job.decoder.embedding, tensor.dequantize())
    return tensor


def write_outside(
    job: Job, shell: Shell, embedding: QuantizedTensor | None, quantized: Tensor, transforming: Transforming | None
) -> None:
    """Round the output head by weighted search, and write the part that is outside the blocks.

    Args:
        embedding: as `quantize_embedding` gave it.
        quantized: what leaves the quantized model's last block, f32 [samples, seqlen, hidden].
    """
    name, head = job.plan.head, job.decoder.head
    tensors: dict[str, Tensor | QuantizedTensor] = dict(job.floats(OUTSIDE))
    if embedding is not None:
        tensors[job.plan.embedding] = embedding
    to_quantize = {} if name in tensors else {name: head}
    untied = {} if name == job.plan.embedding else {name: head}
    moments = SecondMoments(equal_weights)
    if job.importance.to_collect(untied, to_quantize):
        for start in range(0, len(job.tokens), job.settings.batch_size):
            part = slice(start, start + job.settings.batch_size)
            inputs = shell.head_input(job.tokens[part], quantized[part])
            moments.add(name, inputs, equal_weights(inputs))
    importance = job.importance.settle(moments.result(), CPU)
    if job.run.is_complete(OUTSIDE):
        return
    if to_quantize:
        load_parameters(head, name.removesuffix("weight"), job.source, CPU, job.decoder.base_prefix)
        weight, grid = weight_of(head), job.grid(name)
        tensors[name] = grid.quantize(weight, initial_scales(grid, weight, importance[name], "search"))
    found = {}
    if transforming is not None:
        load_outside(job, lambda name: job.source_tensor(name).float(), CPU)
        found["logits_divergence"] = transforming.check()
    job.run.write_part(OUTSIDE, tensors, {}, transforms=found)


def load_outside(job: Job, value: Callable[[str], Tensor], device: torch.device) -> None:
    """Put all that is outside the blocks into the model; `value` gives each parameter in f32."""
    loaded = {t.name: frozen(value(t.name).to(device)) for t in job.plan.of_part(OUTSIDE)}
    loaded |= {alias: loaded[owner] for alias, owner in job.plan.tied.items() if owner in loaded}
    for name, parameter in loaded.items():
        set_parameter(job.decoder.model, name, parameter)


def frozen(tensor: Tensor) -> nn.Parameter:
    """A parameter that takes no gradient."""
    return nn.Parameter(tensor, requires_grad=False)


def _load_own(job: Job, module: nn.Module, name: str) -> None:
    """Load the parameters that a module holds itself, not those of its children."""
    for leaf, parameter in module._parameters.items():
        if parameter is not None:
            module._parameters[leaf] = frozen(job.source_tensor(f"{name}.{leaf}" if name else leaf).float())
