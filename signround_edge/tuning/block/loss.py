"""Loss of a unit: the weighted squared error of its output against the full-precision one."""

from __future__ import annotations

import functools
import operator

import torch
from torch import Tensor

from signround_edge.tuning.block.unit import Unit
from signround_edge.tuning.settings import TuningSettings


def loss_gradient(unit: Unit, output: Tensor, index: Tensor, samples: int | None = None) -> Tensor:
    """∂L/∂output of the mean of `weighted_loss`, in the memory of nothing else: 2/N·weight·(output − target).

    Args:
        samples: how many the mean is over, where other ranks have some of them.
    """
    target = unit.target(index)
    count = target.numel() if samples is None else samples * target[0].numel()
    weights = unit.token_weights(target).mul_(2 / count)
    return (output - target).mul_(weights)


def weighted_loss(unit: Unit, output: Tensor, index: Tensor) -> Tensor:
    """Weighted squared errors of the unit's output for some samples, same shape as the output."""
    target = unit.target(index)
    return (output - target).square() * unit.token_weights(target)


def held_out_loss(unit: Unit, settings: TuningSettings, autocast: torch.autocast) -> float:
    """Loss over the held-out samples of all ranks, computed as in the training steps but summed in f64.

    It is summed where it is computed, so that a GPU is waited for once.
    """
    losses, count = list[Tensor](), 0
    with torch.no_grad():
        for index in unit.held_out.split(settings.batch_size) if len(unit.held_out) else ():
            with autocast:
                output = unit.forward(index)
            loss = weighted_loss(unit, output.float(), index)
            losses.append(loss.sum(dtype=torch.float64))
            count += loss.numel()
    # One after another: so are those of a rank that holds out no sample, which has none.
    device = unit.matrices[0].weight.device
    total = functools.reduce(operator.add, losses) if losses else torch.zeros((), dtype=torch.float64, device=device)
    if not unit.ranks.alone:
        total = unit.ranks.sum(total)
        count = unit.ranks.total(count)
    return float(total) / count
