"""What is outside the decoder blocks: the embedding before them, norm and output head behind them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from signround_edge.formats import QuantizedTensor
from signround_edge.manifest import OUTSIDE
from signround_edge.model.decoder import set_tensor, set_weight, unload_parameters, weight_of
from signround_edge.model.weights import ModelWeights
from signround_edge.tuning.block.start import initial_scales
from signround_edge.tuning.block.transforming import Transforming
from signround_edge.tuning.calibration.activations import Stream, equal_weights
from signround_edge.tuning.calibration.input_moments import SecondMoments
from signround_edge.tuning.calibration.shell import Shell, block_returns_tuple
from signround_edge.tuning.job import CPU, Job


def open_shell(weights: ModelWeights, tokens: Tensor) -> Shell:
    """The model without its blocks: all that is outside them but the head is loaded, as the source stores it.

    Args:
        tokens: any samples, int64 [samples, seqlen].
    """
    decoder = weights.decoder
    inside = set(decoder.blocks.modules())
    for name, module in decoder.model.named_modules():
        if module not in inside and module is not decoder.head:
            weights.load(module, f"{name}." if name else "", CPU, deep=False)
    weights.load(decoder.blocks[0], decoder.block_prefix(0), CPU)
    shell = Shell(decoder, block_returns_tuple(decoder, tokens[:1, :2]))
    unload_parameters(decoder.blocks[0])
    return shell


def embed(job: Job, shell: Shell) -> Stream:
    """What enters block 0 for all samples, by the embedding that is loaded."""
    return Stream(torch.cat([shell.embed(part) for part in job.tokens.split(job.settings.batch_size)]))


def quantize_embedding(job: Job, shell: Shell) -> QuantizedTensor | None:
    """Round the token embedding and install it; None where it stays in floats."""
    name = job.plan.embedding
    if not job.run.is_quantized(name):
        return None
    grid, weight = job.grid(name), weight_of(job.decoder.embedding)
    importance = job.importance.given.get(name, torch.ones(weight.shape[1]))
    tensor = grid.quantize(weight, initial_scales(grid, weight, importance, "search"))
    if shell.depends_on_tokens(job.tokens[:1]):
        shell.exact_embedding = job.decoder.embedding._parameters["weight"]
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
        job.weights.load(head, name.removesuffix("weight"), CPU)
        weight, grid = weight_of(head), job.grid(name)
        tensors[name] = grid.quantize(weight, initial_scales(grid, weight, importance[name], "search"))
    found = {}
    if transforming is not None:
        load_outside(job, lambda name: job.weights.tensor(name).float(), CPU)
        found["logits_divergence"] = transforming.check()
    job.run.write_part(OUTSIDE, tensors, {}, transforms=found)


def load_outside(job: Job, value: Callable[[str], Tensor], device: torch.device) -> None:
    """Put all that is outside the blocks into the model; `value` gives each parameter in f32."""
    loaded = {t.name: frozen(value(t.name).to(device)) for t in job.plan.of_part(OUTSIDE)}
    loaded |= {alias: loaded[owner] for alias, owner in job.plan.tied.items() if owner in loaded}
    for name, parameter in loaded.items():
        set_tensor(job.decoder.model, name, parameter)


def frozen(tensor: Tensor) -> nn.Parameter:
    """A parameter that takes no gradient."""
    return nn.Parameter(tensor, requires_grad=False)
