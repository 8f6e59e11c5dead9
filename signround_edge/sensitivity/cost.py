"""What a type would cost the model on a tensor: ½·tr(G·δ·H·δᵀ), in nats a token of KL divergence.

δ is of the codes that tuning would start from. In the blocks these are GPTQ's, whose δ·H·δᵀ is Σ_j D_j·e_j² of the
errors e of single roundings (`conditional_variances`); e is taken of the weights rounded to nearest on the scales of
the search, which GPTQ keeps. Embeddings and heads are rounded to nearest, and cost what that does.

Some rows stand for all of a matrix. An error is a share of what is rounded, so a row i is taken by chance proportional
to what its weights themselves would cost, c_i = G_i·Σ_j D_j·w_ij², and counts Σc / c_i: the sum's error is that of the
shares alone (Hansen and Hurwitz 1943).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from signround_edge.formats import Grid
from signround_edge.sensitivity.measured import HeadSensitivity, LookupSensitivity, MatrixSensitivity
from signround_edge.tuning.block.start import initial_scales

# On SmolLM2 the cost of a matrix differs by 0.7 % (root mean square) from that of all its rows; see docs/LOG.md.
_ROWS = 64
_LOOKUP_ROWS = 512  # of the embedding 0.2 %
_ROWS_AT_ONCE = 4096

Cost = Callable[[Grid], float]


def matrix_cost(found: MatrixSensitivity, weight: Tensor) -> Cost:
    """Of a matrix f32 [out, in] in a block."""
    sample = _Rows.of(found.outputs, weight, found.conditional, _ROWS)
    return lambda grid: 0.5 * sample.sum(grid, found.inputs, found.conditional)


def lookup_cost(found: LookupSensitivity, weight: Tensor) -> Cost:
    """Of a table f32 [rows, features] that is looked up by token: each row counts as often as it is looked up."""
    sample, plain = _Rows.of(found.frequencies, weight, found.outputs, _LOOKUP_ROWS), torch.ones(weight.shape[1])
    return lambda grid: 0.5 * sample.sum(grid, plain, found.outputs)


def head_cost(found: HeadSensitivity, weight: Tensor) -> Cost:
    """Of the output head: half the variance of what its errors add to the logits of some tokens.

    Not of each logit by itself: what all rows have in common (activations have a mean) changes no probability.
    """

    def cost(grid: Grid) -> float:
        changes = found.sample @ _errors(weight[found.rows], grid, found.inputs).T * found.slopes
        mean = (found.probabilities * changes).sum(1, keepdim=True)
        return 0.5 * float((found.probabilities * (changes - mean).square_()).sum()) / len(found.sample)

    return cost


@dataclass(frozen=True)
class _Rows:
    """Rows that stand for all.

    Attributes:
        weight: f32 [n, in].
        factors: for how much each stands, f32 [n].
    """

    weight: Tensor
    factors: Tensor

    @classmethod
    def of(cls, outputs: Tensor, weight: Tensor, inputs: Tensor, most: int) -> _Rows:
        """At most so many rows of a weight [out, in], by what they weigh: outputs f32 [out], inputs f32 [in]."""
        counted = outputs.nonzero().flatten()
        parts = [weight[rows].float().square_() @ inputs for rows in counted.split(_ROWS_AT_ONCE)]
        shares = outputs[counted] * torch.cat(parts) if parts else outputs[counted]
        rows, factors = _proportional(shares.double(), most)
        return cls(weight[counted[rows]].float().contiguous(), factors.float() * outputs[counted[rows]])

    def sum(self, grid: Grid, importance: Tensor, inputs: Tensor) -> float:
        """Σ_i outputs_i·Σ_j inputs_j·e_ij² over all rows, of the errors e on a grid."""
        if not len(self.weight):
            return 0.0
        return float(self.factors @ (_errors(self.weight, grid, importance).square_() @ inputs))


def _proportional(shares: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Numbers of at most so many shares f64 [n], the larger ones more likely, and what each counts in a sum over all.

    Evenly spaced along the running sum of shares, the largest first (systematic sampling).
    """
    order = shares.argsort(descending=True, stable=True)[: int((shares > 0).sum())]
    if len(order) <= most:
        return order, torch.ones(len(order), dtype=shares.dtype)
    running = shares[order].cumsum(0)
    points = (torch.arange(most, dtype=shares.dtype) + 0.5) / most * running[-1]
    taken, times = torch.searchsorted(running, points).clamp_max(len(order) - 1).unique(return_counts=True)
    rows = order[taken]
    return rows, times * running[-1] / (most * shares[rows])


def _errors(weight: Tensor, grid: Grid, importance: Tensor) -> Tensor:
    """ŵ − w f32 of rows rounded to nearest on the scales of the search."""
    weight = weight.float().contiguous()
    rounded = grid.quantize(weight, initial_scales(grid, weight, importance, "search")).dequantize()
    return rounded - weight
