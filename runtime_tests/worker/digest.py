"""Digests of logits: what comes back over a thin line instead of all of them.

For each scored position the k most likely tokens with their log-probabilities, the log of the mass of all others, and
the loss. A divergence computed from that is the true KL divergence of the distribution in which all other tokens are
one: never more than that of the full distributions, and the nearer the larger k is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from signround_edge.evaluation.metrics import FloatArray, TokenArray

DEFAULT_TOP = 256


@dataclass(frozen=True)
class Digest:
    """Digest of n positions.

    Attributes:
        top_ids: int32 [n, k], the most likely tokens, the likeliest first.
        top_logp: f32 [n, k], their log-probabilities.
        rest_logp: f32 [n], log of the mass of all other tokens; -inf where there is none.
        loss: f32 [n], −log-probability of the token that followed.
    """

    top_ids: TokenArray
    top_logp: FloatArray
    rest_logp: FloatArray
    loss: FloatArray


def digest_of(logits: FloatArray, targets: TokenArray, top: int = DEFAULT_TOP) -> Digest:
    """Digest of f32 [n, vocab] logits; `targets` int32 [n] are the tokens that followed."""
    log_p = log_softmax64(logits)
    top = min(top, logits.shape[1])
    rows = np.arange(len(log_p))
    order = np.argsort(-log_p, axis=-1, kind="stable")
    ids, others = order[:, :top], order[:, top:]
    with np.errstate(divide="ignore"):
        rest = np.log(np.exp(np.take_along_axis(log_p, others, axis=-1)).sum(axis=-1))
    return Digest(
        ids.astype(np.int32),
        np.take_along_axis(log_p, ids, axis=-1).astype(np.float32),
        rest.astype(np.float32),
        -log_p[rows, targets].astype(np.float32),
    )


def log_softmax64(logits: FloatArray) -> NDArray[np.float64]:
    """Log-probabilities f64 [n, vocab] of f32 [n, vocab] logits."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result
