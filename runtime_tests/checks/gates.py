"""The gates: which figures of a runtime against torch pass, and in what words they do not."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from devices import Tolerances
from signround_edge.evaluation.metrics import Scores


@dataclass(frozen=True)
class Gate:
    """One comparison that decided: it passes when `figure` is at most `limit`.

    Attributes:
        name: "kld_mean", "ln_ppl_difference" (its absolute value), "control_kld_mean",
            "known_difference_kld_mean" or "layer_error".
        figure: what was found; None when it is no number.
    """

    name: str
    figure: float | None
    limit: float
    passed: bool


def miss_exact_gate(scores: Scores, tolerances: Tolerances) -> str | None:
    """Why a runtime that computes in floats does not agree with torch; None when it does."""
    kld = scores.kld_mean
    if kld is not None and kld <= tolerances.exact_kld_mean:
        return None
    return f"the mean KL divergence from torch is {_figure(kld)}, more than {tolerances.exact_kld_mean:g}"


def miss_quantized_gate(scores: Scores, tolerances: Tolerances) -> str | None:
    """Why a runtime that rounds activations does not agree with torch; None when it does.

    The mean KL divergence is bounded, and ln(perplexity) may differ by what chance explains: a number of standard
    errors of the paired log-ratio, or the small bias that rounding activations is allowed.
    """
    kld = scores.kld_mean
    if miss_exact_gate(scores, tolerances) is None:
        return None
    if kld is None or not kld <= tolerances.quantized_kld_mean:
        return f"the mean KL divergence from torch is {_figure(kld)}, more than {tolerances.quantized_kld_mean:g}"
    assert scores.ppl_reference is not None
    assert scores.ln_ratio_stderr is not None
    difference = math.log(scores.ppl / scores.ppl_reference)
    by_chance = tolerances.standard_errors * scores.ln_ratio_stderr
    if abs(difference) <= max(by_chance, tolerances.ln_ppl_bias):
        return None
    return (
        f"ln(perplexity) differs from torch's by {difference:+.4f}, more than {tolerances.standard_errors:g} standard "
        f"errors ({by_chance:.4f}) and more than {tolerances.ln_ppl_bias:g}"
    )


def gates(scores: Scores, tolerances: Tolerances, computes_in_floats: bool) -> list[Gate]:
    """The comparisons that `miss_exact_gate` or `miss_quantized_gate` make, one by one."""
    if computes_in_floats:
        return [gate("kld_mean", scores.kld_mean, tolerances.exact_kld_mean)]
    kld = gate("kld_mean", scores.kld_mean, tolerances.quantized_kld_mean)
    assert scores.ppl_reference is not None
    assert scores.ln_ratio_stderr is not None
    with np.errstate(all="ignore"):
        difference = float(abs(np.log(scores.ppl) - np.log(scores.ppl_reference)))
    limit = max(tolerances.standard_errors * scores.ln_ratio_stderr, tolerances.ln_ppl_bias)
    return [kld, gate("ln_ppl_difference", difference, limit)]


def gate(name: str, figure: float | None, limit: float) -> Gate:
    """A comparison: a figure that is no number does not pass."""
    known = figure is not None and math.isfinite(figure)
    return Gate(
        name,
        figure if known else None,
        limit if math.isfinite(limit) else 0.0,
        known and figure <= limit,  # type: ignore[operator]
    )


def _figure(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3g}"
