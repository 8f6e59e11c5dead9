"""What one run works on, and the few things that all its stages ask of it."""

from __future__ import annotations

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
from signround_edge.tuning.calibration.activations import equal_weights, relative_weights
from signround_edge.tuning.calibration.importance import Importance
from signround_edge.tuning.settings import TuningSettings

CPU = torch.device("cpu")


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
    """

    weights: ModelWeights
    plan: Plan
    tokens: Tensor
    settings: TuningSettings
    device: torch.device
    run: RunDirectory
    progress: Progress
    importance: Importance

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
        """Sample indices to (train on, hold out): every n-th sample is held out, so the slice covers the whole text."""
        count = len(self.tokens)
        if count == 1:
            return torch.tensor([0]), torch.tensor([0])
        every = max(2, round(1 / self.settings.held_out))
        held_out = torch.arange(count) % every == min(every, count) - 1
        return torch.nonzero(~held_out).flatten(), torch.nonzero(held_out).flatten()

    def batches(self, index: int, train: Tensor, batch_size: int | None = None) -> Iterator[Tensor]:
        """Endless shuffled batches of `train`.

        Each block `index` seeds its own order, so that resuming needs no generator state.
        """
        generator = torch.Generator().manual_seed(self.settings.seed * 100_003 + index)
        size = min(batch_size or self.settings.batch_size, len(train))
        while True:
            order = train[torch.randperm(len(train), generator=generator)]
            for start in range(0, len(order) - size + 1, size):
                yield order[start : start + size]
