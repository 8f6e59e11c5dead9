"""The transform `channel-scales` in the block loop: each block's folds, kept where rounding then does it less harm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from signround_edge.formats import QuantizedTensor
from signround_edge.formats.channel_scales import ChannelScales
from signround_edge.model.decoder import set_tensor
from signround_edge.model.experts import stacks
from signround_edge.progress import Progress
from signround_edge.run_directory import RunDirectory
from signround_edge.schemes.roles import head_size
from signround_edge.transforms.block_transform import BlockTransform
from signround_edge.transforms.channel_scales import Consumer, search_scales
from signround_edge.transforms.check import check_hidden_states, check_logits, logits_divergence
from signround_edge.transforms.find_folds import find_folds
from signround_edge.transforms.folds import Fold, is_norm
from signround_edge.tuning.block.start import initial_scales
from signround_edge.tuning.block.unit import Matrix
from signround_edge.tuning.calibration.block_call import Shared
from signround_edge.tuning.calibration.shell import Shell

# Tokens of the short text on which folds are tried and the transformed model is compared with the original.
CHECK_TOKENS = 32


@dataclass
class ChannelScaling:
    """The transform of a run's blocks, one after another.

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
    ) -> ChannelScaling:
        """For a model whose embedding is loaded in full precision; `tokens` [samples, seqlen] are the calibration's."""
        few = tokens[:1, :CHECK_TOKENS]
        scaling = cls(replace(shell, calls={}, latest=None), few, device, progress, compares)
        scaling.original = scaling.transformed = scaling.shell.embed(few).to(device)
        scaling.shell.exact_embedding = shell.decoder.embedding._parameters["weight"]
        return scaling

    def choose(
        self, index: int, matrices: list[Matrix], loss: Callable[[], float], scale_init: str
    ) -> tuple[BlockTransform, dict[str, Any]]:
        """The transform of a loaded block, and a report of it.

        Each fold's scales are kept only where they lower the block's loss with all matrices rounded to nearest.

        Args:
            matrices: those to quantize, with the source's weights.
            loss: the block's loss on the held-out samples for the weights that are in it.
        """
        block, prefix = self.shell.decoder.blocks[index], self.shell.decoder.block_prefix(index)
        own = {m.name.removeprefix(prefix): m for m in matrices}
        folds = self._folds(index, own)
        source = dict(block.named_parameters())
        best, rounded = BlockTransform(), {name: _rounded(m, scale_init) for name, m in own.items()}
        _install(own, rounded)
        plain = lowest = loss()
        kept: dict[str, float] = {}
        for fold in folds:
            names = [f"{name}.weight" for name in fold.consumers]
            scaled = [transformed_matrix(own[name], best.of(name)) for name in names]
            found = search_scales(fold, [Consumer(m.weight, m.importance, m.grid) for m in scaled])
            if found is None:
                continue
            trial = best.with_fold(self._restored(block, source), fold, found[0])
            changed = [*names, f"{fold.producer}.weight"]
            again = {n: _rounded(transformed_matrix(own[n], trial.of(n)), scale_init) for n in changed if n in own}
            _install(own, {**rounded, **again})
            trial.install_vectors(block)
            if (now := loss()) < lowest:
                best, rounded, lowest = trial, {**rounded, **again}, now
                kept[str(fold)] = found[1]
        self._restored(block, source)
        less = 1 - lowest / plain if plain else 0.0
        self.progress.line(
            f"{index + 1}/{len(self.shell.decoder.blocks)} channel scales: held-out loss of rounding {plain:.3e} → "
            f"{lowest:.3e} ({less:.0%} less) by {len(kept)} of {len(folds)} folds"
        )
        return best, {"channel-scales": {"rounded_before": plain, "rounded": lowest, "weighted_errors": kept}}

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

    def _run(self, index: int, hidden: Tensor, shared: Shared) -> Tensor:
        with torch.no_grad(), self.shell.exact():
            call = self.shell.block_call(index, self.tokens, self.device)
            return call.run(self.shell.decoder.blocks[index], hidden.clone(), shared).float()

    def _folds(self, index: int, own: dict[str, Matrix]) -> list[Fold]:
        """The block's folds whose matrices are all quantized; on the first block the user is told of the others."""
        block = self.shell.decoder.blocks[index]
        with torch.no_grad():
            found = find_folds(
                block, lambda: self._run(index, self.original, dict(self.shared)), self.original, self._head_size
            )
        folds = [fold for fold in found if all(name in own for name in _matrices(block, fold))]
        if index == 0:
            reached = {f"{name}.weight" for fold in folds for name in fold.consumers}
            left = stacks([name for name in own if name not in reached])
            self.progress.line(f"channel scales: {'; '.join(map(str, folds)) or 'this model has no place for them'}")
            if left:
                self.progress.line(f"no channel scales before {', '.join(left)}: what they read cannot be scaled")
        return folds

    @property
    def _head_size(self) -> int:
        return head_size(self.shell.decoder.model.config)

    def _restored(self, block: nn.Module, source: dict[str, nn.Parameter]) -> nn.Module:
        for name, parameter in source.items():
            set_tensor(block, name, parameter)
        return block


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


def _matrices(block: nn.Module, fold: Fold) -> list[str]:
    layers = fold.consumers if is_norm(block.get_submodule(fold.producer)) else (*fold.consumers, fold.producer)
    return [f"{name}.weight" for name in layers]


def _rounded(matrix: Matrix, scale_init: str) -> QuantizedTensor:
    return matrix.grid.quantize(
        matrix.weight, initial_scales(matrix.grid, matrix.weight, matrix.importance, scale_init)
    )


def _install(own: dict[str, Matrix], tensors: dict[str, QuantizedTensor]) -> None:
    for name, matrix in own.items():
        matrix.install(tensors[name].dequantize())
