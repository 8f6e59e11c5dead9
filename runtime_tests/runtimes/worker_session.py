"""A loaded artifact that lives in a worker: what the sessions of all worker-run runtimes share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime_tests.transports.interface import Transport, Worker
from runtime_tests.transports.reconnecting import ReconnectingWorker
from runtime_tests.worker.digest import DEFAULT_TOP, Digest
from runtime_tests.worker.protocol import Message
from signround_edge.evaluation.metrics import FloatArray, TokenArray, Windows


class WorkerSession(ReconnectingWorker):
    """Use as a context manager, or call `close`; nothing is left running after either.

    A connection that breaks is made anew, the artifact opened again (its bytes are there already), and the request
    repeated; what was answered before is kept.

    Args:
        runtime: its name in the worker's table.
        transport: the way to the device.
        artifact: the file or folder.
        timeout: seconds a request may take.
        options: of the engine.
        digest: whether `scored` brings digests back, not all logits.

    Attributes:
        vocab_size: width of the logits, where the file says it.
        options: as given.
        facts: what the engine tells about the file.
        seconds: time that the device has computed for us.
        peak_memory_bytes: of the process that computes, where it can say it.
    """

    def __init__(
        self,
        runtime: str,
        transport: Transport,
        artifact: Path,
        timeout: float,
        options: dict[str, Any] | None = None,
        digest: bool = False,
    ) -> None:
        super().__init__(str(artifact), self._connect)
        self._runtime, self._transport, self._artifact, self._timeout = runtime, transport, artifact, timeout
        self.options = options or {}
        self._digest = digest
        self._computed: dict[bytes, FloatArray | Digest] = {}
        self._progress: tuple[float | None, str] = (None, "")  # for a person who watches a page
        self.facts: dict[str, Any] = {}
        self.vocab_size: int | None = None
        self.seconds = 0.0
        self.peak_memory_bytes: int | None = None
        self._patiently(self._started)

    def logits(self, tokens: TokenArray) -> FloatArray:
        """f32 [n, vocab] next-token logits at every position of int32 [n], from an empty cache.

        Raises:
            UserError: the runtime cannot run the file; WorkerFailure when it died or hung.
        """
        return self._call("logits", {"tokens": tokens.astype(np.int32)}).arrays["logits"]

    def scored(self, tokens: TokenArray, first: int) -> FloatArray | Digest:
        """The predictions at positions first … n−2 of a window int32 [n], from an empty cache.

        Either f32 [n−1−first, vocab] logits or their digest; errors as in `logits`.
        """
        if tokens.tobytes() in self._computed:
            return self._computed[tokens.tobytes()]
        progress, label = self._progress
        header = {"first": first, "full": not self._digest, "top": DEFAULT_TOP, "progress": progress, "label": label}
        reply = self._call("run", {"tokens": tokens.astype(np.int32)}, **header)
        if not self._digest:
            return reply.arrays["logits"]
        names = ("top_ids", "top_logp", "rest_logp", "loss")
        return Digest(*(reply.arrays[name] for name in names))

    def compute_ahead(self, windows: Windows) -> None:
        """With digests: compute all windows and end the worker, so that the device holds one model at a time."""
        if not self._digest:
            return
        count = len(windows.tokens)
        for index, window in enumerate(windows.tokens):
            self._progress = (index / count, f"{self._runtime}, {self._artifact.name}: window {index + 1} of {count}")
            self._computed[window.tobytes()] = self.scored(window, windows.first_scored)
        self.close()

    @property
    def shows_hidden_states(self) -> bool:
        """Whether the engine can answer `hidden_states`; browsers cannot."""
        return bool(self.facts.get("shows_hidden_states"))

    def hidden_states(self, tokens: TokenArray, width: int) -> dict[str, FloatArray]:
        """Every float tensor [n, width] that the graph computes for int32 [n], by the graph's own name.

        Raises:
            UserError: the runtime cannot run the file, or show it; WorkerFailure when it died or hung.
        """
        reply = self._call("hidden_states", {"tokens": tokens.astype(np.int32)}, width=width)
        return {name: reply.arrays[str(i)] for i, name in enumerate(reply.header["names"])}

    def _call(self, op: str, arrays: dict[str, NDArray[Any]] | None = None, **header: Any) -> Message:
        reply = self.call(op, arrays, **header)
        self.seconds += float(reply.header.get("seconds") or 0.0)
        peak = reply.header.get("peak_memory_bytes")
        if peak:
            self.peak_memory_bytes = max(int(peak), self.peak_memory_bytes or 0)
        return reply

    def _connect(self) -> Worker:
        worker = self._transport.start(str(self._artifact), self._timeout)
        try:
            name = worker.push(self._artifact)
            reply = worker.call("open", runtime=self._runtime, artifact=name, options=self.options)
            self.facts = reply.header["facts"]
            self.vocab_size = self.facts["vocab_size"]
        except BaseException:
            worker.close()
            raise
        return worker
