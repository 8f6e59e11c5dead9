"""A loaded artifact that lives in a worker process: what the sessions of all worker-run runtimes share."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import numpy as np

from runtime_tests.transports.local import LocalWorker
from signround_edge.metrics import FloatArray, TokenArray


class WorkerSession:
    """Use as a context manager, or call `close`; nothing is left running after either.

    Attributes:
        vocab_size: width of the logits, where the file says it.
        facts: what the engine tells about the file.
    """

    def __init__(self, runtime: str, artifact: Path, timeout: float, options: dict[str, Any] | None = None) -> None:
        self._worker = LocalWorker(str(artifact), timeout)
        try:
            reply = self._worker.call("open", runtime=runtime, artifact=str(artifact.absolute()), options=options or {})
        except BaseException:
            self._worker.close()
            raise
        self.facts: dict[str, Any] = reply.header["facts"]
        self.vocab_size: int | None = self.facts["vocab_size"]

    def logits(self, tokens: TokenArray) -> FloatArray:
        """f32 [n, vocab] next-token logits at every position of int32 [n], from an empty cache.

        Raises:
            UserError: the runtime cannot run the file; WorkerFailure when it died or hung.
        """
        return self._worker.call("logits", {"tokens": tokens.astype(np.int32)}).arrays["logits"]

    @property
    def shows_hidden_states(self) -> bool:
        """Whether the engine can answer `hidden_states`; browsers cannot."""
        return bool(self.facts.get("shows_hidden_states"))

    def hidden_states(self, tokens: TokenArray, width: int) -> dict[str, FloatArray]:
        """Every float tensor [n, width] that the graph computes for int32 [n], by the graph's own name.

        Raises:
            UserError: the runtime cannot run the file, or show it; WorkerFailure when it died or hung.
        """
        reply = self._worker.call("hidden_states", {"tokens": tokens.astype(np.int32)}, width=width)
        return {name: reply.arrays[str(i)] for i, name in enumerate(reply.header["names"])}

    def close(self) -> None:
        """End the worker. May be repeated."""
        self._worker.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
