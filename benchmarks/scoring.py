"""The exact model's logits, computed once for all rows of a command."""

from __future__ import annotations

from signround_edge.evaluation.metrics import FloatArray, TokenArray
from signround_edge.evaluation.perplexity import TorchSession


class RememberingSession:
    """A session that computes the logits of a window once: every row is scored on the same ones."""

    def __init__(self, session: TorchSession) -> None:
        self._session = session
        self._known: dict[bytes, FloatArray] = {}

    def logits(self, tokens: TokenArray) -> FloatArray:
        """See `TorchSession.logits`."""
        key = tokens.tobytes()
        if key not in self._known:
            self._known[key] = self._session.logits(tokens)
        return self._known[key]
