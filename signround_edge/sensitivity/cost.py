"""What a type would cost the model on a tensor: ½·tr(G·δ·H·δᵀ), in nats a token of KL divergence.

δ is of the codes that tuning would start from. In the blocks these are GPTQ's, whose δ·H·δᵀ is Σ_j D_j·e_j² of the
errors e of single roundings (`conditional_variances`); e is taken of the weights rounded to nearest on the scales of
the search, which GPTQ keeps. Embeddings and heads are rounded to nearest, and cost what that does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from signround_edge.formats import Grid
from signround_edge.sensitivity.measured import HeadSensitivity, LookupSensitivity, MatrixSensitivity
from signround_edge.tuning.block.start import initial_scales

# Rows that stand for all of a matrix: on SmolLM2 the sum over a model differs by less than 1 % from that of all.
_ROWS, _LOOKUP_ROWS = 192, 4096
_TINY = torch.finfo(torch.float32).tiny


def matrix_cost(found: MatrixSensitivity, weight: Tensor, grid: Grid) -> float:
    """Of a matrix f32 [out, in] in a block."""
    rows = _spread(len(weight), _ROWS)
    slopes = found.outputs[rows]
    if float(slopes.sum()) <= _TINY:
        return 0.0
    errors = _errors(weight[rows], grid, found.inputs).square_()
    share = float(found.outputs.sum() / slopes.sum())
    return 0.5 * share * float(slopes @ (errors @ found.conditional))


def head_cost(found: HeadSensitivity, weight: Tensor, grid: Grid) -> float:
    """Of the output head f32 [vocabulary, in]: half the variance of what its errors add to the logits of some tokens.

    Not of each logit by itself: what all rows have in common (activations have a mean) changes no probability.
    """
    changes = found.sample @ _errors(weight[found.rows], grid, found.inputs).T * found.slopes
    mean = (found.probabilities * changes).sum(1, keepdim=True)
    return 0.5 * float((found.probabilities * (changes - mean).square_()).sum()) / len(found.sample)


def lookup_cost(found: LookupSensitivity, weight: Tensor, grid: Grid) -> float:
    """Of a table f32 [rows, features] that is looked up by token: each row counts as often as it is looked up."""
    order = found.frequencies.argsort(descending=True)
    rows = order[:_LOOKUP_ROWS]
    frequencies = found.frequencies[rows]
    errors = _errors(weight[rows], grid, torch.ones(weight.shape[1])).square_()
    return 0.5 * float(frequencies @ (errors @ found.outputs)) / max(float(frequencies.sum()), _TINY)


def _errors(weight: Tensor, grid: Grid, importance: Tensor) -> Tensor:
    """ŵ − w f32 of rows rounded to nearest on the scales of the search."""
    weight = weight.float().contiguous()
    rounded = grid.quantize(weight, initial_scales(grid, weight, importance, "search")).dequantize()
    return rounded - weight


def _spread(count: int, most: int) -> Tensor:
    """At most so many numbers below `count`, evenly spread."""
    return torch.arange(0, count, max(1, -(-count // most)))
