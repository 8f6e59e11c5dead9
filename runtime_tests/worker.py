"""The worker process: `python -m runtime_tests.worker` loads one artifact and answers requests on stdin and stdout.

It exists because a runtime may abort, hang or be killed on a corrupt file; then only this process dies. It ends when
its stdin ends, also in the middle of a computation, so that nothing is left running when the client is gone.

Requests, by their "op":
    open        {runtime, artifact, options} → the engine's facts
    logits      {} + tokens i32 [n]        → logits f32 [n, vocab]
    hidden_states {width} + tokens         → {names} + "0", "1", … f32 [n, width]
    generate    {max_new} + tokens         → tokens i32
    tokenize    {text, add_special, parse_special} → tokens i32
    detokenize  {} + tokens                → {text}
    dequantize  {type, count} + data u8    → weights f32 [count]   (libggml)
    onnx_weights {artifact}                → {}                    (ONNX Runtime)
    next_weight {}                         → {name} + weights f32, or {name: null} after the last
A reply with "error" holds one sentence about the input; a crash holds none.
"""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from runtime_tests.transports.protocol import Message, ProtocolError, receive, send
from signround_edge.errors import UserError


class Worker:
    """State of the process: at most one open engine."""

    def __init__(self) -> None:
        self._engine: Any = None
        self._weights: Iterator[tuple[str, Any]] = iter(())
        self._operations: dict[str, Callable[[Message], Message]] = {
            "open": self._open,
            "logits": lambda m: Message({}, {"logits": self._opened().logits(m.arrays["tokens"])}),
            "hidden_states": self._hidden_states,
            "generate": self._generate,
            "tokenize": self._tokenize,
            "detokenize": lambda m: Message({"text": self._opened().detokenize(m.arrays["tokens"])}),
            "dequantize": self._dequantize,
            "onnx_weights": self._onnx_weights,
            "next_weight": self._next_weight,
        }

    def answer(self, request: Message) -> Message:
        """The reply to a request; UserError becomes a reply, anything else ends the process with a traceback."""
        try:
            return self._operations[request.header["op"]](request)
        except UserError as error:
            return Message({"error": str(error)})

    def _opened(self) -> Any:
        if self._engine is None:
            raise UserError("no artifact is open")
        return self._engine

    def _open(self, request: Message) -> Message:
        h = request.header
        self._engine = _ENGINES[h["runtime"]](Path(h["artifact"]), h["options"])
        return Message({"facts": self._engine.facts()})

    def _hidden_states(self, request: Message) -> Message:
        found = self._opened().hidden_states(request.arrays["tokens"], request.header["width"])
        return Message({"names": list(found)}, {str(i): array for i, array in enumerate(found.values())})

    def _generate(self, request: Message) -> Message:
        import numpy as np

        tokens = self._opened().generate(request.arrays["tokens"], request.header["max_new"])
        return Message({}, {"tokens": np.array(tokens, dtype=np.int32)})

    def _tokenize(self, request: Message) -> Message:
        import numpy as np

        h = request.header
        tokens = self._opened().tokenize(h["text"], h["add_special"], h["parse_special"])
        return Message({}, {"tokens": np.array(tokens, dtype=np.int32)})

    def _dequantize(self, request: Message) -> Message:
        from runtime_tests.runtimes.llama_cpp_engine import ggml_to_float

        h = request.header
        return Message({}, {"weights": ggml_to_float(h["type"], request.arrays["data"], h["count"])})

    def _onnx_weights(self, request: Message) -> Message:
        from runtime_tests.runtimes.onnx_dequantize import dequantize_through_runtime

        self._weights = dequantize_through_runtime(Path(request.header["artifact"]))
        return Message({})

    def _next_weight(self, _request: Message) -> Message:
        for name, weights in self._weights:
            return Message({"name": name}, {"weights": weights})
        return Message({"name": None})


def _llama_cpp(artifact: Path, options: dict[str, Any]) -> Any:
    from runtime_tests.runtimes.llama_cpp_engine import LlamaCppEngine

    return LlamaCppEngine(artifact, **options)


def _onnxruntime(artifact: Path, options: dict[str, Any]) -> Any:
    from runtime_tests.runtimes.onnx_engine import OnnxEngine

    return OnnxEngine(artifact, **options)


# Imported on demand: a worker loads one runtime, and starts as fast as that allows.
_ENGINES: dict[str, Callable[[Path, dict[str, Any]], Any]] = {"llama.cpp": _llama_cpp, "onnxruntime": _onnxruntime}


def main() -> None:
    """Answer requests until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C belongs to the client, which then closes our stdin
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a C library prints goes to stderr, not between our frames
    requests: queue.Queue[Message] = queue.Queue()
    threading.Thread(target=_read_requests, args=(sys.stdin.buffer, requests), daemon=True).start()
    worker = Worker()
    try:
        while True:
            send(replies, worker.answer(requests.get()))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # an ordinary exit would wait for the thread that reads stdin


def _read_requests(stream: BinaryIO, requests: queue.Queue[Message]) -> None:
    """Queue requests; leave at once when the client is gone, whatever the main thread is doing."""
    while True:
        try:
            request = receive(stream)
        except ProtocolError as error:
            print(f"bad request: {error}", file=sys.stderr, flush=True)
            os._exit(3)
        if request is None:
            os._exit(0)
        requests.put(request)


if __name__ == "__main__":
    main()
