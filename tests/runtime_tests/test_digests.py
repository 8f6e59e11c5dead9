"""Digests of logits: the same figures as from all of them, as far as a digest can."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime_tests.checks.parity import Contender, divergence, score
from runtime_tests.worker.digest import Digest, digest_of
from signround_edge.evaluation.metrics import FloatArray, ScoreKeeper, TokenArray, Windows, log_softmax


def random_logits(seed: int, rows: int, vocab: int, spread: float) -> FloatArray:
    return (np.random.default_rng(seed).standard_normal((rows, vocab)) * spread).astype(np.float32)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.integers(2, 60), st.floats(0.1, 8.0))
def test_a_digest_of_everything_gives_the_divergence_of_the_logits(seed: int, vocab: int, spread: float) -> None:
    reference, logits = random_logits(seed, 5, vocab, spread), random_logits(seed + 1, 5, vocab, spread)
    targets = np.zeros(5, dtype=np.int32)
    keeper = ScoreKeeper()
    keeper.add(logits, targets, reference)
    digest = digest_of(logits, targets, vocab)
    np.testing.assert_allclose(divergence(reference, digest), keeper.kld[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(digest.loss, keeper.nll[0], rtol=1e-5, atol=1e-5)
    assert np.all(np.isneginf(digest.rest_logp))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 40), st.floats(0.1, 8.0))
def test_a_shorter_digest_never_shows_more_divergence(seed: int, top: int, spread: float) -> None:
    reference, logits = random_logits(seed, 4, 50, spread), random_logits(seed + 1, 4, 50, spread)
    targets = np.zeros(4, dtype=np.int32)
    short = divergence(reference, digest_of(logits, targets, top))
    assert np.all(short <= divergence(reference, digest_of(logits, targets, 50)) + 1e-5)
    assert np.all(short >= -1e-5)


def test_the_top_tokens_are_named_in_order_and_the_rest_is_their_complement() -> None:
    logits = np.array([[0.0, 3.0, 1.0, 2.0]], dtype=np.float32)
    digest = digest_of(logits, np.array([2], dtype=np.int32), 2)
    assert digest.top_ids.tolist() == [[1, 3]]
    log_p = log_softmax(logits)[0]
    np.testing.assert_allclose(digest.top_logp[0], log_p[[1, 3]], rtol=1e-5)
    np.testing.assert_allclose(digest.rest_logp[0], np.log(np.exp(log_p[[0, 2]]).sum()), rtol=1e-5)
    np.testing.assert_allclose(digest.loss[0], -log_p[2], rtol=1e-5)


class GivesDigests:
    def __init__(self, logits: FloatArray) -> None:
        self._logits = logits

    def logits(self, tokens: TokenArray) -> FloatArray:
        raise AssertionError("only the digest travels")

    def scored(self, tokens: TokenArray, first: int) -> Digest:
        return digest_of(self._logits[first:-1], tokens[first + 1 :], 20)


class GivesLogits:
    def __init__(self, logits: FloatArray) -> None:
        self._logits = logits

    def logits(self, _tokens: TokenArray) -> FloatArray:
        return self._logits


def test_scores_from_digests_are_those_from_logits() -> None:
    tokens = np.random.default_rng(3).integers(0, 30, (2, 16)).astype(np.int32)
    base = random_logits(2, 16, 30, 4.0)
    ours = base + random_logits(1, 16, 30, 0.1)
    full, thin = Contender(GivesLogits(ours)), Contender(GivesDigests(ours))
    score([full, thin], Windows(tokens), GivesLogits(base), GivesLogits(base), log=str)
    a, b = full.parity.scores(), thin.parity.scores()
    assert b.ppl == pytest.approx(a.ppl, rel=1e-5)
    assert b.ppl_reference == pytest.approx(a.ppl_reference, rel=1e-6)
    assert b.top1_agreement == a.top1_agreement
    assert a.kld_mean is not None
    assert b.kld_mean == pytest.approx(a.kld_mean, rel=0.02)  # ten unlikely tokens are one
    assert thin.fidelity.scores().tokens == full.fidelity.scores().tokens == 14
