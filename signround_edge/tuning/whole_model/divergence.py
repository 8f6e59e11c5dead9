"""KL divergence from the exact model's next-token probabilities, of which the most probable tokens are kept.

With the K most probable tokens of p one by one and all others as one token r (its probability is the sum of theirs):

    KL = Σ_k p_k·(log p_k − log p̂_k) + p_r·(log p_r − log p̂_r)

It is at most the divergence over all tokens, and as good a loss: it needs the exact model's logits once instead of at
every step. With z the logits of p̂:

    ∂KL/∂z_v = p̂_v − p_v for the K tokens,   p̂_v·(1 − p_r/p̂_r) for the others
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

KEPT_TOKENS = 512
_TINY = 1e-30


@dataclass(frozen=True)
class TopProbabilities:
    """The exact model's next-token probabilities at N positions.

    Attributes:
        tokens: int32 [N, K], the most probable tokens.
        log_p: f32 [N, K], their log-probabilities.
        rest: f32 [N], the probability of all others together.
    """

    tokens: Tensor
    log_p: Tensor
    rest: Tensor

    @classmethod
    def of(cls, logits: Iterable[Tensor], device: torch.device) -> TopProbabilities:
        """From logits f32 [n, vocabulary] of some positions after the others; the result is on `device`."""
        parts = [_top(part, device) for part in logits]
        return cls(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def at(self, positions: Tensor, device: torch.device) -> TopProbabilities:
        """Those at some positions, on a device."""
        return TopProbabilities(*(t[positions].to(device) for t in (self.tokens, self.log_p, self.rest)))


def _top(logits: Tensor, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    log_p = logits.log_softmax(-1)
    top = log_p.topk(min(KEPT_TOKENS, log_p.shape[1]), dim=-1)
    rest = log_p.exp_().scatter_(1, top.indices, 0.0).sum(-1)
    return top.indices.to(device, torch.int32), top.values.to(device), rest.to(device)


def kl_divergence(exact: TopProbabilities, logits: Tensor) -> Tensor:
    """KL divergence f32 [N] of the probabilities of logits f32 [N, vocabulary]; differentiable, uses up the logits."""
    found: Tensor = _KlDivergence.apply(logits, exact.tokens.long(), exact.log_p, exact.rest)
    return found


class _KlDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor, log_p: Tensor, rest: Tensor) -> Tensor:
        log_sum = logits.logsumexp(-1, keepdim=True)
        found_log = logits.gather(1, tokens) - log_sum
        # In place: a tensor of [N, vocabulary] is by far the largest there is.
        slopes = logits.sub_(log_sum).exp_().scatter_(1, tokens, 0.0)
        found_rest = slopes.sum(-1)
        p = log_p.exp()
        divergence = (p * (log_p - found_log)).sum(-1)
        divergence += rest * (rest.clamp_min(_TINY) / found_rest.clamp_min(_TINY)).log()
        slopes.mul_((1 - rest / found_rest.clamp_min(_TINY)).unsqueeze(-1)).scatter_(1, tokens, found_log.exp_() - p)
        ctx.save_for_backward(slopes)
        return divergence

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        (slopes,) = ctx.saved_tensors
        return slopes * gradient.unsqueeze(-1), None, None, None
