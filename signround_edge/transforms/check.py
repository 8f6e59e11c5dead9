"""That a transform leaves the model's function as it is."""

from __future__ import annotations

import torch
from torch import Tensor

from signround_edge.errors import UserError

# Mean KL divergence in nats; rounding of f32 gives about 1e-12.
LOGITS_LIMIT = 1e-6
# Relative change of hidden states; rounding of f32 gives 1e-6. This much is far above 1e-6 in KL divergence.
_HIDDEN_LIMIT = 1e-3


def logits_divergence(original: Tensor, transformed: Tensor) -> float:
    """Mean KL divergence of next-token probabilities, from logits [tokens, vocabulary] of both models."""
    p, q = (torch.log_softmax(logits.double(), dim=-1) for logits in (original, transformed))
    return float((p.exp() * (p - q)).sum(-1).mean())


def check_logits(divergence: float) -> None:
    """UserError where the transformed model is another one; `divergence` as `logits_divergence` gives it."""
    if not divergence <= LOGITS_LIMIT:
        raise UserError(
            f"--transform changes the logits of this model (mean KL divergence {divergence:.1e}, at most "
            f"{LOGITS_LIMIT:.0e} is allowed), which is a bug; leave --transform out, and please report the model"
        )


def check_hidden_states(original: Tensor, transformed: Tensor, block: int) -> None:
    """UserError where hidden states [1, tokens, hidden] differ by more than rounding after decoder block `block`."""
    change = (original - transformed).norm(dim=-1) / original.norm(dim=-1).clamp_min(1e-30)
    if not float(change.mean()) <= _HIDDEN_LIMIT:
        raise UserError(
            f"--transform changes what decoder block {block} computes (by {float(change.mean()):.1e} of its output), "
            "which is a bug; leave --transform out, and please report the model"
        )
