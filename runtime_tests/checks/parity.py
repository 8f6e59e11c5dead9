"""Parity and fidelity: runtimes against torch, window by window."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np

from runtime_tests.worker.digest import Digest, log_softmax64
from signround_edge.errors import UserError
from signround_edge.evaluation.metrics import FloatArray, ScoreKeeper, TokenArray, Windows, log_softmax


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
    """The same figures as from logits, with all tokens outside the digest as one."""
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


def divergence(reference: FloatArray, digest: Digest) -> FloatArray:
    """f32 [n]: KL(reference ‖ digest) in nats, with all tokens outside the digest as one; reference f32 [n, vocab]."""
    log_r = log_softmax64(reference)
    top_r = np.take_along_axis(log_r, digest.top_ids.astype(np.int64), axis=-1)
    inside = (np.exp(top_r) * (top_r - digest.top_logp)).sum(axis=-1)
    others = np.ones_like(log_r, dtype=bool)
    np.put_along_axis(others, digest.top_ids.astype(np.int64), False, axis=-1)
    rest_r = np.where(others, np.exp(log_r), 0.0).sum(axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        outside = np.where(rest_r > 0, rest_r * (np.log(rest_r) - digest.rest_logp), 0.0)
    result: FloatArray = (inside + outside).astype(np.float32)
    return result
