"""KL divergence over the most probable tokens: value and gradient beside autograd's over all tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from signround_edge.tuning.whole_model import divergence
from signround_edge.tuning.whole_model.divergence import TopProbabilities, kl_divergence

CPU = torch.device("cpu")


def pair(vocabulary: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(20, vocabulary, generator=generator) * 4
    return exact, exact + torch.randn(exact.shape, generator=generator) * 0.3


def over_all(exact: Tensor, logits: Tensor) -> Tensor:
    log_p = exact.log_softmax(-1)
    return (log_p.exp() * (log_p - logits.log_softmax(-1))).sum(-1)


def with_one_rest(exact: Tensor, logits: Tensor, kept: int) -> Tensor:
    """The divergence by its definition: the kept tokens, and the sum of all others as one more."""
    order = exact.argsort(-1, descending=True)
    p, found = (x.softmax(-1).gather(1, order).double() for x in (exact, logits))
    p, found = (torch.cat([x[:, :kept], x[:, kept:].sum(-1, keepdim=True)], 1) for x in (p, found))
    return (p * (p.log() - found.log())).sum(-1).float()


def test_with_all_tokens_it_is_the_plain_divergence() -> None:
    exact, logits = pair(divergence.KEPT_TOKENS)
    leaf = logits.clone().requires_grad_()
    weights = torch.arange(20.0)
    found = kl_divergence(TopProbabilities.of([exact], CPU), leaf.clone())
    torch.testing.assert_close(found, over_all(exact, logits), rtol=1e-4, atol=1e-6)
    (found * weights).sum().backward()
    expected = logits.clone().requires_grad_()
    (over_all(exact, expected) * weights).sum().backward()
    assert leaf.grad is not None
    assert expected.grad is not None
    torch.testing.assert_close(leaf.grad, expected.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kept", [1, 30])
def test_other_tokens_count_as_one(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divergence, "KEPT_TOKENS", kept)
    exact, logits = pair(100)
    leaf, expected = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    found = kl_divergence(TopProbabilities.of([exact[:7], exact[7:]], CPU), leaf.clone())
    value = with_one_rest(exact, expected, kept)
    torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-6)
    assert bool((found <= over_all(exact, logits) + 1e-6).all())
    found.sum().backward()
    value.sum().backward()
    assert leaf.grad is not None
    assert expected.grad is not None
    torch.testing.assert_close(leaf.grad, expected.grad, rtol=1e-3, atol=1e-6)


def test_probabilities_at_some_positions() -> None:
    exact, logits = pair(600)
    every = TopProbabilities.of([exact], CPU)
    positions = torch.tensor([3, 11])
    found = kl_divergence(every.at(positions, CPU), logits[positions].clone())
    torch.testing.assert_close(found, kl_divergence(every, logits.clone())[positions])


def test_certain_predictions_stay_finite() -> None:
    exact = torch.full((2, 600), -200.0)
    exact[:, 5] = 200.0
    logits = exact.roll(1, -1).clone().requires_grad_()
    found = kl_divergence(TopProbabilities.of([exact], CPU), logits.clone())
    found.sum().backward()
    assert bool(found.isfinite().all())
    assert logits.grad is not None
    assert bool(logits.grad.isfinite().all())
