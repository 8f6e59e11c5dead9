"""Which samples are trained on, how far the rounding may travel, how fast, and when it is checked."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from signround_edge.tuning.settings import TuningSettings

# The first rate of V times the number of steps; rates fall linearly to 0, so no V can go further than half of this.
V_TRAVEL = 0.7


def travel_from_gptq(settings: TuningSettings, codes: float, left: float, distinct: int) -> float:
    """The first rate of V times the number of steps where V starts from GPTQ's codes.

    It is 1.2 for 16 codes and 800 samples in all steps, if GPTQ's codes were no better than the nearest. It goes with
    1/codes; with the root of the samples, as what signs of gradients say grows with their number and what they sum up
    to by chance with its root; with the square of what is left to V; and where more than 56 samples are distinct with
    the root of their number, as what is true of these samples alone falls with it. See docs/LOG.md.

    Args:
        codes: how many a value has to choose among.
        left: loss of GPTQ's codes over that of the nearest ones, both without what the block inherits.
        distinct: the samples that are trained on.
    """
    samples = settings.steps * settings.batch_size * max(1, distinct / 56)
    return min(V_TRAVEL, 19.2 / codes * math.sqrt(samples / 800) * left**2)


def check_steps(steps: int, checks: int) -> set[int]:
    """After how many steps the held-out loss is measured: evenly over the second half.

    In the first half the rate is high and the loss still falls: no block of a real model ever had its best there.
    """
    return {steps - steps * i // (2 * checks) for i in range(checks)}


def split_samples(count: int, held_out: float) -> tuple[Tensor, Tensor]:
    """Sample indices to (train on, hold out): every n-th sample is held out, so the slice covers the whole text."""
    if count == 1:
        return torch.tensor([0]), torch.tensor([0])
    every = max(2, round(1 / held_out))
    is_held_out = torch.arange(count) % every == min(every, count) - 1
    return torch.nonzero(~is_held_out).flatten(), torch.nonzero(is_held_out).flatten()


def shares_whole_model(settings: TuningSettings, count: int, world: int) -> bool:
    """Whether so many processes can share the whole-model stage: each has as many samples of every batch.

    Args:
        count: calibration samples of all processes.
    """
    if world == 1:
        return True
    train, size = len(split_samples(count, settings.held_out)[0]), settings.whole_model_batch_size
    return train >= size and math.gcd(size, min(settings.batch_size, train)) % world == 0
