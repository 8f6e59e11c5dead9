"""The pass over the original model: forward through the blocks, then backward, one block in memory at a time.

The slopes are those of the log-likelihood of labels that are drawn from the model's own distribution, so that E[g·gᵀ]
is Fisher's matrix: the curvature of the KL divergence from the model (Martens 2020, arXiv 1412.1193, section 5).
What enters each block is kept in a file; each block is run forward again from there when its turn backward comes.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from signround_edge.model.decoder import out_in, unload_parameters
from signround_edge.model.language_model import name_of
from signround_edge.model.weights import ModelWeights
from signround_edge.progress import Progress
from signround_edge.sensitivity.backward import Backward, run_backward
from signround_edge.sensitivity.gradient_moments import GradientMoments
from signround_edge.sensitivity.measured import LookupSensitivity, MatrixSensitivity, Measured
from signround_edge.sensitivity.outside import HeadPass, lookup_slopes
from signround_edge.tuning.calibration.activations import Store, Stream, relative_weights, run_block
from signround_edge.tuning.calibration.input_moments import SecondMoments
from signround_edge.tuning.calibration.shell import Shell
from signround_edge.tuning.cpu.attention import use_blocked_attention
from signround_edge.tuning.outside import open_shell


@dataclass(frozen=True)
class _Pass:
    """What all steps of the pass work on.

    Attributes:
        folder: for files that are gone afterwards.
        batch: samples at a time.
    """

    weights: ModelWeights
    shell: Shell
    tokens: Tensor
    device: torch.device
    progress: Progress
    folder: Path
    batch: int

    @property
    def parts(self) -> list[slice]:
        """The batches."""
        return [slice(start, start + self.batch) for start in range(0, len(self.tokens), self.batch)]


def measure(
    weights: ModelWeights,
    tokens: Tensor,
    device: torch.device,
    seed: int,
    progress: Progress,
    scratch: Path,
    batch: int = 4,
) -> Measured:
    """How much each tensor of a model matters on a text.

    Args:
        tokens: int64 [samples, seqlen].
        seed: of the labels.
        scratch: folder for the hidden states between blocks, f32 [samples, seqlen, hidden] each.
        batch: samples at a time.
    """
    decoder = weights.decoder
    use_blocked_attention(decoder.model, device)
    shell = open_shell(weights, tokens)
    total = 2 * len(decoder.blocks) + 1
    tied = decoder.head._parameters["weight"] is decoder.embedding._parameters["weight"]
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="hidden-", dir=scratch) as folder:
        run = _Pass(weights, shell, tokens, device, progress, Path(folder), batch)
        streams, inputs, last = _forward(run, total)
        weights.load(decoder.head, f"{name_of(decoder.model, decoder.head)}.", torch.device("cpu"))
        head = HeadPass(shell, seed)
        slopes, labels = head.run(tokens, last.hidden, run.parts)
        of_head = head.found()
        progress.parts(len(decoder.blocks) + 1, total)
        if not tied:
            unload_parameters(decoder.head)
        state = Backward(slopes)
        matrices: dict[str, MatrixSensitivity] = {}
        for index in reversed(range(len(decoder.blocks))):
            matrices |= _backward(run, index, streams[index], state, inputs)
            streams[index] = Stream(torch.empty(0))
            progress.parts(total - index, total)
        found = lookup_slopes(shell, tokens, state, run.parts)
    lookups = {
        name: LookupSensitivity(
            outputs, torch.bincount(tokens.flatten(), minlength=rows).float()[:rows] / tokens.numel()
        )
        for name, (outputs, rows) in found.items()
    }
    return Measured(matrices, of_head, lookups, labels)


def _forward(run: _Pass, total: int) -> tuple[list[Stream], dict[str, Tensor], Stream]:
    """What enters each block, parameter name → E[x²], and what leaves the last block."""
    decoder = run.weights.decoder
    autocast = torch.autocast(run.device.type, enabled=False)
    stream = Stream(torch.cat([run.shell.embed(run.tokens[part]) for part in run.parts]))
    streams: list[Stream] = []
    inputs: dict[str, Tensor] = {}
    for index, block in enumerate(decoder.blocks):
        streams.append(_on_disk(stream, run.folder))
        run.weights.load(block, decoder.block_prefix(index), run.device)
        moments = SecondMoments(relative_weights)
        with moments.watching(block, decoder.matrices(index)):
            stream = run_block(
                decoder, run.shell, index, run.tokens, stream, run.batch, run.device, autocast, moments, in_place=True
            )
        inputs |= {name: found.cpu() for name, found in moments.result().items()}
        unload_parameters(block)
        run.progress.parts(index + 1, total)
    return streams, inputs, stream


def _backward(
    run: _Pass, index: int, stream: Stream, state: Backward, inputs: dict[str, Tensor]
) -> dict[str, MatrixSensitivity]:
    """A block's matrices; `state` then holds the slopes of what entered the block."""
    decoder = run.weights.decoder
    block = decoder.blocks[index]
    run.weights.load(block, decoder.block_prefix(index), run.device)
    moments, modules = GradientMoments(), decoder.matrices(index)
    with moments.watching(modules):
        for part in run.parts:
            run_backward(run.shell, index, run.tokens[part], stream, part, state, run.device)
    state.close_block()
    found = moments.result(run.tokens.numel())
    unload_parameters(block)
    return {name: _sensitivity(module, inputs.get(name), found.get(name)) for name, module in modules.items()}


def _sensitivity(module: nn.Module, inputs: Tensor | None, found: tuple[Tensor, Tensor] | None) -> MatrixSensitivity:
    """Of a matrix; where no token came to it (an expert's), no error costs anything."""
    rows, cols = out_in(module).shape
    inputs = torch.ones(cols) if inputs is None else inputs
    outputs, conditional = (torch.zeros(rows), inputs.clone()) if found is None else found
    return MatrixSensitivity(outputs, inputs, conditional)


def _on_disk(stream: Stream, folder: Path) -> Stream:
    """A copy whose hidden states are in a file: the system keeps in memory what there is room for."""
    kept = Store(folder=folder).empty(tuple(stream.hidden.shape))
    return Stream(kept.copy_(stream.hidden), stream.shared)
