"""Transforms in the block loop: each block's is installed, stored and compared with the original model."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from signround_edge.formats.channel_scales import ChannelScales
from signround_edge.progress import Progress
from signround_edge.run_directory import RunDirectory
from signround_edge.transforms.block_transform import BlockTransform
from signround_edge.transforms.check import check_hidden_states, check_logits, logits_divergence
from signround_edge.tuning.block.unit import Matrix
from signround_edge.tuning.calibration.activations import Shell

# Tokens of the short text on which transforms may try blocks, and the transformed model is compared with the original.
CHECK_TOKENS = 32


@dataclass
class Transforming:
    """What the transforms make of a run's blocks, one after another, beside the original model.

    Attributes:
        shell: of the model, for texts of `CHECK_TOKENS`.
        tokens: int64 [1, at most CHECK_TOKENS].
        compares: whether the transformed model is compared with the original; the whole-model stage makes another one.
        original, transformed: what enters the next block of the original model and of the transformed one, f32.
    """

    shell: Shell
    tokens: Tensor
    device: torch.device
    progress: Progress
    compares: bool
    original: Tensor = field(init=False)
    transformed: Tensor = field(init=False)

    @classmethod
    def start(
        cls, shell: Shell, tokens: Tensor, device: torch.device, progress: Progress, compares: bool
    ) -> Transforming:
        """For a model whose embedding is loaded in full precision; `tokens` [samples, seqlen] are the calibration's."""
        few = tokens[:1, :CHECK_TOKENS]
        made = cls(replace(shell, calls={}), few, device, progress, compares)  # calls are for texts of one length
        made.original = made.transformed = made.shell.embed(few).to(device)
        return made

    def install(self, index: int, transform: BlockTransform) -> None:
        """Put a transform into a block that holds the source's weights; UserError where it changes the function."""
        block = self.shell.decoder.blocks[index]
        if not self.compares:
            transform.install(block)
            return
        self.original = self.run(index, self.original)
        transform.install(block)
        self.transformed = self.run(index, self.transformed)
        check_hidden_states(self.original, self.transformed, index)

    def check(self) -> float:
        """Mean KL divergence of the transformed model's logits from the original's; UserError above the limit.

        All that is outside the blocks must be loaded in full precision on the CPU.
        """
        with torch.no_grad():
            # Copies: some models change hidden states in place.
            logits = [self.shell.logits(hidden[0].to("cpu", copy=True)) for hidden in (self.original, self.transformed)]
        divergence = logits_divergence(*logits)
        check_logits(divergence)
        self.progress.line(
            f"transformed model: mean KL divergence {divergence:.1e} from the original, in full precision"
        )
        return divergence

    def run(self, index: int, hidden: Tensor) -> Tensor:
        """What leaves the loaded block for hidden states f32 [1, tokens, hidden] of `tokens`."""
        call = self.shell.block_call(index, self.tokens, self.device)
        with torch.no_grad():
            return call.run(self.shell.decoder.blocks[index], hidden.clone()).float()


def stored_transform(run: RunDirectory, part: str, prefix: str) -> BlockTransform:
    """The transform of a block that is complete, as the run directory holds it."""
    scales: dict[str, ChannelScales] = {}
    vectors: dict[str, Tensor] = {}
    for name in run.names():
        entry, own = run.entry(name), name.removeprefix(prefix)
        if entry.part == part and entry.format is not None:
            scales[own] = run.channel_scales(name)
        elif entry.part == part and len(entry.shape) == 1:
            vectors[own] = run.float_tensor(name).float()
    return BlockTransform(scales, vectors)


def transformed_matrix(matrix: Matrix, scales: ChannelScales) -> Matrix:
    """A matrix of the source as the transform makes it: the weight scaled, E[x²] that of the scaled inputs."""
    columns = scales.columns
    importance = matrix.importance if columns is None else matrix.importance / columns.square()
    return replace(matrix, weight=scales.apply(matrix.weight), importance=importance)
