"""What is outside the decoder blocks: the embedding before them, norm and output head behind them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from signround_edge.formats import QuantizedTensor, joined
from signround_edge.manifest import OUTSIDE
from signround_edge.model.decoder import set_tensor, set_weight, unload_parameters, weight_of
from signround_edge.model.weights import ModelWeights
from signround_edge.tuning.block.start import initial_scales
from signround_edge.tuning.block.transforming import Transforming
from signround_edge.tuning.calibration.activations import CPU, Stream, equal_weights
from signround_edge.tuning.calibration.input_moments import SecondMoments
from signround_edge.tuning.calibration.shell import Shell, block_returns_tuple
from signround_edge.tuning.job import Job

_VALUES_AT_ONCE = 1 << 28  # 1 GB as f32; the token embedding of most models is below


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
    """What enters block 0 for all own samples, by the embedding that is loaded."""
    filled, hidden = 0, None
    for part in job.own_tokens.split(job.settings.batch_size):
        states = shell.embed(part)
        if hidden is None:
            hidden = job.store.empty((len(job.own_tokens), *states.shape[1:]))
        hidden[filled : filled + len(part)] = states
        filled += len(part)
    assert hidden is not None
    return Stream(hidden)


def copied(job: Job, stream: Stream) -> Stream:
    """The same hidden states in memory of their own, before any block has run."""
    return Stream(job.store.empty(tuple(stream.hidden.shape)).copy_(stream.hidden))


def release_lookups(job: Job, shell: Shell) -> None:
    """Give back the memory of the embeddings once all samples are embedded: a gigabyte or two of large models.

    From then on the model is asked for what blocks are called with, and what enters block 0 is put in its place. Where
    that depends on the tokens the embeddings stay.
    """
    if shell.depends_on_tokens(job.tokens[:1]):
        return
    for module in job.decoder.lookups.values():
        weight = weight_of(module)
        set_weight(module, weight.new_zeros(1, 1).expand(weight.shape))


def quantize_lookups(job: Job, shell: Shell) -> dict[str, QuantizedTensor]:
    """Round the embeddings and install them; parameter name → codes and scales of those that are quantized."""
    depends = shell.depends_on_tokens(job.tokens[:1])
    found: dict[str, QuantizedTensor] = {}
    for name, module in zip(job.plan.lookups, job.decoder.lookups.values(), strict=True):
        if not job.run.is_quantized(name):
            continue
        grid, weight = job.grid(name), weight_of(module)
        importance = job.importance.given.get(name, torch.ones(weight.shape[1]))
        # Row by row nothing depends on another: a table of per-layer embeddings is too large to search at once.
        step = max(1, _VALUES_AT_ONCE // weight.shape[1])
        parts = [
            grid.quantize(rows, initial_scales(grid, rows, importance, "search"))
            for rows in (part.float() for part in weight.split(step))
        ]
        found[name] = joined(parts)
        if depends:
            shell.exact_lookups[module] = module._parameters["weight"]
        set_weight(module, _dequantized(parts, weight, name == job.plan.embedding))
    return found


def _dequantized(parts: list[QuantizedTensor], weight: Tensor, exactly: bool) -> Tensor:
    """The rounded weights; of all but the token embedding in the source's dtype, since they may be most of a model."""
    rounded = torch.empty_like(weight, dtype=torch.float32 if exactly else weight.dtype)
    for part, rows in zip(parts, rounded.split(len(parts[0].codes)), strict=True):
        rows.copy_(part.dequantize())
    return rounded


def write_outside(
    job: Job, shell: Shell, lookups: dict[str, QuantizedTensor], quantized: Tensor, transforming: Transforming | None
) -> None:
    """Round the output head by weighted search, and write the part that is outside the blocks.

    Args:
        lookups: as `quantize_lookups` gave them.
        quantized: what leaves the quantized model's last block, f32 or bf16 [own samples, seqlen, hidden].
    """
    name, head = job.plan.head, job.decoder.head
    tensors: dict[str, Tensor | QuantizedTensor] = {**job.floats(OUTSIDE), **lookups}
    to_quantize = {} if name in tensors else {name: head}
    untied = {} if name == job.plan.embedding else {name: head}
    moments = SecondMoments(equal_weights)
    if job.importance.to_collect(untied, to_quantize):
        for start in range(0, len(job.own_tokens), job.settings.batch_size):
            part = slice(start, start + job.settings.batch_size)
            inputs = shell.head_input(job.own_tokens[part], quantized[part].cpu().float())
            moments.add(name, inputs, equal_weights(inputs))
    moments.sum_over(job.ranks, CPU)
    importance = job.importance.settle(moments.result(), CPU)
    if job.run.is_complete(OUTSIDE) or not job.ranks.first:
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
