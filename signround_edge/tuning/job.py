"""What one run works on, and the few things that all its stages ask of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from signround_edge.formats import Grid, get_grid
from signround_edge.model.decoder import Decoder
from signround_edge.model.weights import ModelWeights
from signround_edge.progress import Progress
from signround_edge.run_directory import RunDirectory
from signround_edge.schemes.plan import Plan
from signround_edge.tuning.calibration.activations import CPU, IN_MEMORY, Store, equal_weights, relative_weights
from signround_edge.tuning.calibration.importance import Importance
from signround_edge.tuning.ranks import ALONE, Ranks
from signround_edge.tuning.schedule import split_samples
from signround_edge.tuning.settings import TuningSettings


@dataclass(frozen=True)
class Job:
    """A run in progress.

    Attributes:
        weights: the model, as stored and as modules.
        plan: every tensor and its format.
        tokens: calibration samples, int64 [samples, seqlen].
        device: where blocks are tuned.
        run: the run directory that is written.
        importance: E[x²] given from elsewhere, and who else wants it.
        store: where hidden states are kept.
        codes_on: where the whole-model stage keeps codes and positions between its steps.
        ranks: the processes that tune together, each of which holds the activations of its own samples.
    """

    weights: ModelWeights
    plan: Plan
    tokens: Tensor
    settings: TuningSettings
    device: torch.device
    run: RunDirectory
    progress: Progress
    importance: Importance
    ranks: Ranks = ALONE
    store: Store = IN_MEMORY
    codes_on: torch.device = CPU

    @property
    def decoder(self) -> Decoder:
        """The model as modules."""
        return self.weights.decoder

    def floats(self, part: str) -> dict[str, Tensor]:
        """The source's float parameters of a part, bit for bit; a transform may put others in their place."""
        return {t.name: self.weights.tensor(t.name) for t in self.plan.of_part(part) if t.format is None}

    def grid(self, name: str) -> Grid:
        """The grid of a quantized parameter."""
        return get_grid(str(self.run.entry(name).format))

    @property
    def token_weights(self) -> Callable[[Tensor], Tensor]:
        """Full-precision output of a unit → weights of its tokens' squared errors [n, seqlen, 1]."""
        return relative_weights if self.settings.loss == "relative" else equal_weights

    def split(self) -> tuple[Tensor, Tensor]:
        """Sample indices to (train on, hold out)."""
        return split_samples(len(self.tokens), self.settings.held_out)

    def batches(self, index: int, train: Tensor, batch_size: int | None = None) -> Iterator[Tensor]:
        """Endless shuffled batches of `train`, the same for any number of ranks.

        The sample at position p belongs to class p mod the batch's size, and each batch takes one of each class, so
        that all ranks have as many samples of a batch. Each block `index` seeds its own order, so that resuming needs
        no generator state.
        """
        generator = torch.Generator().manual_seed(self.settings.seed * 100_003 + index)
        size = min(batch_size or self.settings.batch_size, len(train))
        classes = [train[number::size] for number in range(size)]
        while True:
            shuffled = [members[torch.randperm(len(members), generator=generator)] for members in classes]
            for step in range(len(train) // size):
                yield torch.stack([members[step] for members in shuffled])

    @property
    def batch_samples(self) -> int:
        """Samples a step, over all ranks."""
        return min(self.settings.batch_size, len(self.split()[0]))

    @functools.cached_property
    def shards(self) -> list[Tensor]:
        """Of each rank, the indices of its own samples, ascending: those of some classes (`batches`), and its share of
        what is held out."""
        train, held_out = self.split()
        if self.ranks.alone:
            return [torch.arange(len(self.tokens))]
        return [
            torch.cat([self._of_rank(train, self.batch_samples, rank), self._of_rank(held_out, len(held_out), rank)])
            .sort()
            .values
            for rank in range(self.ranks.world)
        ]

    def _of_rank(self, samples: Tensor, period: int, rank: int) -> Tensor:
        return samples[torch.arange(len(samples)) % period % self.ranks.world == rank]

    @functools.cached_property
    def own_tokens(self) -> Tensor:
        """This rank's samples, int64 [own samples, seqlen]."""
        return self.tokens if self.ranks.alone else self.tokens[self.shards[self.ranks.rank]]

    def own_split(self) -> tuple[Tensor, Tensor]:
        """`split` among `own_tokens`."""
        train, held_out = self.split()
        if self.ranks.alone:
            return train, held_out
        rank = self.ranks.rank
        return (
            self._among_own(self._of_rank(train, self.batch_samples, rank)),
            self._among_own(self._of_rank(held_out, len(held_out), rank)),
        )

    def own_batches(self, index: int, batch_size: int | None = None) -> Iterator[Tensor]:
        """What of each batch this rank has, as indices of `own_tokens`.

        Args:
            batch_size: one that is not the settings'; see `shares_whole_model` for several ranks.
        """
        batches = self.batches(index, self.split()[0], batch_size)
        if self.ranks.alone:
            return batches
        return (self._among_own(batch[self.ranks.rank :: self.ranks.world]) for batch in batches)

    def _among_own(self, samples: Tensor) -> Tensor:
        return torch.searchsorted(self.shards[self.ranks.rank], samples.contiguous())
