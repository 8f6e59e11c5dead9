"""The worker process: `python -m runtime_tests.worker` loads one artifact and answers requests on stdin and stdout.

It exists because a runtime may abort, hang or be killed on a corrupt file; then only this process dies. It ends when
its stdin ends, also in the middle of a computation, so that nothing is left running when the client is gone. It runs on
devices too, and imports nothing that they would lack: numpy, and the runtime that is asked for.

Requests, by their "op":
    open        {runtime, artifact, options} → the engine's facts
    logits      {} + tokens i32 [n]        → logits f32 [n, vocab]
    hidden_states {width} + tokens         → {names} + "0", "1", … f32 [n, width]
    generate    {max_new} + tokens         → tokens i32
    tokenize    {text, add_special, parse_special} → tokens i32
    detokenize  {} + tokens                → {text}
    run         {first, full, top} + tokens → the predictions at positions first … n−2: logits f32, or with full false
                                             their digest (see `runtime_tests.worker.digest`)
    dequantize  {type, count} + data u8    → weights f32 [count]   (libggml)
    have, put, arrange                     as in `runtime_tests.worker.remote_store`, data u8
    dequantize_node {node_op, rows, cols, dtype} + model u8 → weights f32 [rows, cols]   (ONNX Runtime, or OpenVINO)
Replies of logits and run also say the seconds that they took and the peak_memory_bytes of the process so far.
A reply with "error" holds one sentence about the input; a crash holds none.
"""

from __future__ import annotations

import importlib
import os
import queue
import re
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from runtime_tests.worker.protocol import Message, ProtocolError, receive, send
from signround_edge.errors import UserError, first_line

_PATIENCE = "SIGNROUND_EDGE_IDLE_SECONDS"


class Worker:
    """State of the process: at most one open engine."""

    def __init__(self) -> None:
        self._engine: Any = None
        self._operations: dict[str, Callable[[Message], Message]] = {
            "open": self._open,
            "logits": self._logits,
            "run": self._run,
            "hidden_states": self._hidden_states,
            "generate": self._generate,
            "tokenize": self._tokenize,
            "detokenize": lambda m: Message({"text": self._opened().detokenize(m.arrays["tokens"])}),
            "dequantize": self._dequantize,
            "dequantize_node": self._dequantize_node,
            "have": self._have,
            "put": self._put,
            "arrange": self._arrange,
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
        self._engine = _engine(h["runtime"])(Path(h["artifact"]), **h["options"])
        return Message({"facts": self._engine.facts()})

    def _logits(self, request: Message) -> Message:
        started = time.monotonic()
        logits = self._opened().logits(request.arrays["tokens"])
        return Message(_usage(started), {"logits": logits})

    def _run(self, request: Message) -> Message:
        started = time.monotonic()
        tokens, first = request.arrays["tokens"], int(request.header["first"])
        logits = self._opened().logits(tokens)[first:-1]
        if request.header["full"]:
            return Message(_usage(started), {"logits": logits})
        from runtime_tests.worker.digest import digest_of

        digest = digest_of(logits, tokens[first + 1 :], int(request.header["top"]))
        return Message(_usage(started), vars(digest))

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
        from runtime_tests.worker.llama_cpp_engine import ggml_to_float

        h = request.header
        return Message({}, {"weights": ggml_to_float(h["type"], request.arrays["data"], h["count"])})

    def _dequantize_node(self, request: Message) -> Message:
        from runtime_tests.worker.onnx_dequantize import NodeModel

        h = request.header
        if h.get("runtime") == "openvino":
            from runtime_tests.worker.openvino_engine import run_node_model
        else:
            from runtime_tests.worker.onnx_dequantize import run_node_model
        node = NodeModel(request.arrays["model"].tobytes(), h["node_op"], h["rows"], h["cols"], h["dtype"])
        try:
            return Message({}, {"weights": run_node_model(node)})
        except UserError:
            raise
        except Exception as error:  # onnxruntime's error classes share no base but Exception
            raise UserError(first_line(error)) from error

    def _have(self, request: Message) -> Message:
        from runtime_tests.worker import remote_store

        return Message({"there": remote_store.have(request.header["sha256"], request.header["bytes"])})

    def _put(self, request: Message) -> Message:
        from runtime_tests.worker import remote_store

        h = request.header
        try:
            there = remote_store.put(h["sha256"], h["bytes"], h["offset"], request.arrays["data"].tobytes())
        except (OSError, ValueError) as error:
            raise UserError(f"the pushed file could not be kept ({error})") from error
        return Message({"there": there})

    def _arrange(self, request: Message) -> Message:
        from runtime_tests.worker import remote_store

        return Message({"path": remote_store.arrange(request.header["files"])})


def _usage(started: float) -> dict[str, Any]:
    """Seconds since `started`, and the most memory that this process has held."""
    peak = _peak_memory()
    return {"seconds": time.monotonic() - started} | ({} if peak is None else {"peak_memory_bytes": peak})


def _peak_memory() -> int | None:
    """In bytes. On Linux from /proc: getrusage there counts what the parent held when it started this process."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _engine(runtime: str) -> Any:
    """The engine of a runtime: `ENGINE` of the module that is named like it ("llama.cpp": llama_cpp_engine).

    Imported on demand: a worker loads one runtime, and starts as fast as that allows.
    """
    return importlib.import_module(f"{__package__}.{re.sub(r'[^a-z0-9]', '_', runtime)}_engine").ENGINE


def main() -> None:
    """Answer requests until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C belongs to the client, which then closes our stdin
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a C library prints goes to stderr, not between our frames
    requests: queue.Queue[Message] = queue.Queue()
    idle = threading.Event()
    threading.Thread(target=_read_requests, args=(sys.stdin.buffer, requests, idle), daemon=True).start()
    worker = Worker()
    try:
        while True:
            idle.set()
            request = requests.get()
            idle.clear()
            send(replies, worker.answer(request))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # an ordinary exit would wait for the thread that reads stdin


def _read_requests(stream: BinaryIO, requests: queue.Queue[Message], idle: threading.Event) -> None:
    """Queue requests; leave at once when the client is gone, whatever the main thread is doing.

    A client whose network vanished closes nothing; so leave too when nobody asks for long (on other machines only).
    """
    patience = float(os.environ.get(_PATIENCE, "0")) or None
    while True:
        if patience and not select.select([stream], [], [], patience)[0]:
            if idle.is_set():
                os._exit(4)
            continue
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
