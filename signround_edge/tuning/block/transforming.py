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
from signround_edge.tuning.calibration.block_call import Shared
from signround_edge.tuning.calibration.shell import Shell

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
        shared, shared_transformed: what their blocks left for later ones.
    """

    shell: Shell
    tokens: Tensor
    device: torch.device
    progress: Progress
    compares: bool
    original: Tensor = field(init=False)
    transformed: Tensor = field(init=False)
    shared: Shared = field(default_factory=dict)
    shared_transformed: Shared = field(default_factory=dict)

    @classmethod
    def start(
        cls, shell: Shell, tokens: Tensor, device: torch.device, progress: Progress, compares: bool
    ) -> Transforming:
        """For a model whose embeddings are in full precision; `tokens` [samples, seqlen] are the calibration's."""
        few = tokens[:1, :CHECK_TOKENS]
        made = cls(replace(shell, calls={}, latest=None, _moved={}), few, device, progress, compares)
        made.shell.exact_lookups = {m: m._parameters["weight"] for m in shell.decoder.lookups.values()}
        made.original = made.transformed = made.shell.embed(few).to(device)
        return made

    def install(self, index: int, transform: BlockTransform) -> None:
        """Put a transform into a block that holds the source's weights; UserError where it changes the function."""
        block = self.shell.decoder.blocks[index]
        self.original = self._run(index, self.original, self.shared)
        transform.install(block)
        if not self.compares:
            return
        self.transformed = self._run(index, self.transformed, self.shared_transformed)
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

    def try_original(self, index: int) -> Tensor:
        """What leaves the block, with the weights that are in it, for what enters it in the original model."""
        return self._run(index, self.original, dict(self.shared))

    def _run(self, index: int, hidden: Tensor, shared: Shared) -> Tensor:
        with torch.no_grad(), self.shell.exact():
            call = self.shell.block_call(index, self.tokens, self.device)
            return call.run(self.shell.decoder.blocks[index], hidden.clone(), shared).float()


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
    return replace(matrix, weight=scales.apply(matrix.exact), importance=importance)
