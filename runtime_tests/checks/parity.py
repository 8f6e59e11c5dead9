"""Parity and fidelity: runtimes against torch, window by window, and the gates that their figures must pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np

from devices import Tolerances
from runtime_tests.report.report import Gate
from runtime_tests.worker.digest import Digest, divergence
from signround_edge.errors import UserError
from signround_edge.evaluation.metrics import FloatArray, ScoreKeeper, Scores, TokenArray, Windows, log_softmax


class GivesLogits(Protocol):
    """A torch model or a runtime's session."""

    def logits(self, tokens: TokenArray) -> FloatArray:
        """f32 [n, vocab] next-token logits at every position of int32 [n]."""
        ...


@runtime_checkable
class GivesScored(Protocol):
    """A session that computes, or brings back, only what is scored."""

    def scored(self, tokens: TokenArray, first: int) -> FloatArray | Digest:
        """The predictions at positions first … n−2 of int32 [n]: f32 [n−1−first, vocab], or their digest."""
        ...


@runtime_checkable
class ComputesAhead(Protocol):
    """A session that may want to be done before the next one is opened: a phone holds one model at a time."""

    def compute_ahead(self, windows: Windows) -> None:
        """Compute what will be scored, if it wants to."""
        ...


@dataclass
class Contender:
    """One artifact, or its control, on one runtime.

    Attributes:
        session: what computes its logits.
        parity: its figures against torch with the same dequantized weights.
        fidelity: its figures against the original model.
        failure: why it could not be scored to the end, in one sentence.
    """

    session: GivesLogits
    parity: ScoreKeeper = field(default_factory=ScoreKeeper)
    fidelity: ScoreKeeper = field(default_factory=ScoreKeeper)
    failure: str | None = None


def score(
    contenders: Sequence[Contender],
    windows: Windows,
    torch_session: GivesLogits,
    reference: GivesLogits | None = None,
    log: Callable[[str], None] = print,
    keep: Callable[[FloatArray], None] | None = None,
) -> None:
    """Fill the figures of all contenders.

    Torch runs once a window for all of them; the logits of one window are all that is kept. A contender that fails is
    left out from then on. `keep` is given torch's logits f32 [scored, vocab] of each window.
    """
    for index, window in enumerate(windows.tokens):
        running = [c for c in contenders if c.failure is None]
        if not running and keep is None:
            return
        log(f"window {index + 1} of {len(windows.tokens)}")
        scored, targets = windows.scored, windows.targets(index)
        base = torch_session.logits(window)[scored]
        if keep is not None:
            keep(base)
        original = None if reference is None or not running else reference.logits(window)[scored]
        for contender in running:
            try:
                logits = _scored(contender.session, window, scored)
            except UserError as error:
                contender.failure = str(error)
                continue
            if isinstance(logits, Digest):
                _add_digest(contender, logits, targets, base, original)
                continue
            if logits.shape != base.shape:
                contender.failure = f"its logits have the shape {list(logits.shape)}, torch's {list(base.shape)}"
                continue
            contender.parity.add(logits, targets, base)
            if original is not None:
                contender.fidelity.add(logits, targets, original)


def _scored(session: GivesLogits, window: TokenArray, scored: slice) -> FloatArray | Digest:
    return session.scored(window, scored.start) if isinstance(session, GivesScored) else session.logits(window)[scored]


def _add_digest(
    contender: Contender, digest: Digest, targets: TokenArray, base: FloatArray, original: FloatArray | None
) -> None:
    """The same figures as from logits; the divergence is that of `runtime_tests.worker.digest`."""
    if digest.loss.shape != targets.shape:
        contender.failure = f"its digest is of {len(digest.loss)} tokens, not {len(targets)}"
        return
    for keeper, reference in ((contender.parity, base), (contender.fidelity, original)):
        if reference is not None:
            keeper.add_figures(
                nll=digest.loss,
                nll_reference=-log_softmax(reference)[range(len(targets)), targets],
                kld=divergence(reference, digest),
                same_top=digest.top_ids[:, 0] == reference.argmax(axis=-1),
            )


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
