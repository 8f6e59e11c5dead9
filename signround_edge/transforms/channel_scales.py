"""Scales of a fold's channels under which its consumers lose less by rounding.

A block's rounding error grows with the largest weight in it, and column k's share of the output's error with E[x_k²].
With scales s the weights become w·s and the inputs x/s, so for R rows the error of a matrix is about

    L(s) = Σ_blocks (Σ_rows range(w·s)²) · (Σ_k∈block E[x_k²]/s_k²)

where range is the block's largest magnitude, or half its extent on affine grids. L is minimised by gradient descent on
log s. It is a model of rounding only, so how far to go towards its minimum is decided by rounding on the grid itself,
with its search of scales; not at all is among the choices. Activation-aware powers, s = rms(x)^a (AWQ, arXiv
2306.00978) and rms(x)^a/rms(w)^b, were worse: they see neither the blocks nor their largest weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from signround_edge.formats import Grid
from signround_edge.transforms.folds import Fold

# Rows a consumer that are looked at: errors are means over hundreds of rows, and columns are all there.
_ROWS = 96
_STEPS, _RATE = 40, 0.06
_SHARES = (0.5, 0.75, 1.0)  # of the way, in log s, to the minimum of L
_LIMIT = 32.0  # scales lie between its inverse and it


@dataclass(frozen=True)
class Consumer:
    """A matrix that reads a fold's channels.

    Attributes:
        weight: f32 [out, in].
        importance: E[x²] f32 [in].
        grid: its target grid.
    """

    weight: Tensor
    importance: Tensor
    grid: Grid

    def sampled(self) -> Consumer:
        """The same with at most `_ROWS` evenly spaced rows, weights of mean square 1."""
        rows = self.weight[:: max(1, self.weight.shape[0] // _ROWS)][:_ROWS]
        floor = self.importance.mean() * 1e-4 + 1e-30
        importance = self.importance.clamp_min(floor)
        return Consumer(rows * rows.square().mean().clamp_min(1e-30).rsqrt(), importance, self.grid)

    def error(self, columns: Tensor) -> float:
        """Weighted squared error of rounding W·diag(columns) on the grid, over that of leaving W out."""
        weight, importance = (self.weight * columns).contiguous(), self.importance / columns.square()
        blocked = importance.view(1, -1, self.grid.block_size)
        tensor = self.grid.quantize(weight, self.grid.search(self.grid.blocked(weight), blocked))
        lost = (tensor.dequantize() - weight).square_().mul_(importance).sum()
        return float(lost / (self.weight.square() * self.importance).sum())


def search_scales(fold: Fold, consumers: list[Consumer]) -> tuple[Tensor, float] | None:
    """The best scales f32 [channels] of geometric mean 1, and what rounding errors are with them relative to those
    without; None where no candidate is better than s = 1."""
    sampled = [consumer.sampled() for consumer in consumers]
    ones = torch.ones(fold.channels, device=consumers[0].weight.device)
    plain = [consumer.error(fold.to_columns(ones)) for consumer in sampled]
    best: tuple[Tensor, float] | None = None
    descended = _descend(fold, sampled)
    for share in _SHARES:
        scales = _normalised(descended * share)
        errors = [consumer.error(fold.to_columns(scales)) for consumer in sampled]
        ratio = sum(error / max(base, 1e-30) for error, base in zip(errors, plain, strict=True)) / len(errors)
        if ratio < (1.0 if best is None else best[1]):
            best = scales, ratio
    return best


def _normalised(logarithms: Tensor) -> Tensor:
    return (logarithms - logarithms.mean()).exp().clamp(1 / _LIMIT, _LIMIT)


def _descend(fold: Fold, consumers: list[Consumer]) -> Tensor:
    """log s [channels] near the minimum of L, by Adam from s = 1."""
    logarithms = torch.zeros(fold.channels, device=consumers[0].weight.device, requires_grad=True)
    optimizer = torch.optim.Adam([logarithms], lr=_RATE)
    for step in range(_STEPS):
        optimizer.param_groups[0]["lr"] = _RATE * (1 - step / _STEPS)
        optimizer.zero_grad()
        with torch.enable_grad():
            columns = fold.to_columns(logarithms.exp())
            torch.stack([_modelled_error(consumer, columns) for consumer in consumers]).sum().backward()
        optimizer.step()
    return logarithms.detach()


def _modelled_error(consumer: Consumer, columns: Tensor) -> Tensor:
    """L of one matrix, relative to its output."""
    grid = consumer.grid
    blocks = grid.blocked(consumer.weight * columns)
    reach = (blocks.amax(-1) - blocks.amin(-1)) / 2 if grid.affine else blocks.abs().amax(-1)
    shares = (consumer.importance / columns.square()).view(-1, grid.block_size).sum(-1)
    return (reach.square().mean(0) * shares).sum() / consumer.importance.sum()
