"""The worker: its protocol, and what the client says when it crashes, hangs or answers garbage."""

from __future__ import annotations

import io
import os
import signal
import struct
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime_tests.transports.local import LocalWorker, WorkerFailure
from runtime_tests.worker.protocol import Message, ProtocolError, receive, send
from signround_edge.errors import UserError
from tests.runtime_tests.processes import killed_client_of_worker, wait_until

DTYPES = ("<f4", "<i4", "<i8", "|u1")


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@given(
    st.dictionaries(st.text(max_size=5).filter(lambda k: k != "arrays"), st.integers() | st.text(), max_size=3),
    st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3)), max_size=3),
)
def test_a_frame_comes_back_as_it_was_sent(header: dict, specs: list) -> None:
    arrays = {f"a{i}": np.arange(int(np.prod(s)), dtype=d).reshape(s) for i, (d, s) in enumerate(specs)}
    stream = io.BytesIO()
    send(stream, Message(header, arrays))
    stream.seek(0)
    back = receive(stream)
    assert back is not None
    assert back.header == header
    assert list(back.arrays) == list(arrays)
    for name, array in arrays.items():
        assert back.arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(back.arrays[name], array)
    assert receive(stream) is None


@given(st.binary(min_size=1, max_size=60))
def test_garbage_is_a_protocol_error(garbage: bytes) -> None:
    with pytest.raises(ProtocolError):
        receive(io.BytesIO(garbage))


@settings(max_examples=30)
@given(st.data())
def test_a_cut_frame_is_a_protocol_error(data: st.DataObject) -> None:
    stream = io.BytesIO()
    send(stream, Message({"op": "x"}, {"a": np.arange(5, dtype=np.int32)}))
    whole = stream.getvalue()
    cut = data.draw(st.integers(1, len(whole) - 1))
    with pytest.raises(ProtocolError):
        receive(io.BytesIO(whole[:cut]))


def test_an_array_larger_than_memory_is_refused_before_it_is_made() -> None:
    header = b'{"arrays": [["a", "<f4", [1099511627776]]]}'
    with pytest.raises(ProtocolError, match="an array of type"):
        receive(io.BytesIO(b"SRE1" + struct.pack("<I", len(header)) + header))


def test_a_worker_ends_when_it_is_closed() -> None:
    worker = LocalWorker("x")
    with pytest.raises(UserError, match="no artifact is open"):
        worker.call("logits", {"tokens": np.zeros(1, dtype=np.int32)})
    assert is_running(worker.pid)
    worker.close()
    assert not is_running(worker.pid)
    worker.close()


def test_a_hanging_worker_is_ended_and_named() -> None:
    worker = LocalWorker("model.gguf", timeout=1.0)
    os.kill(worker.pid, signal.SIGSTOP)
    started = time.monotonic()
    with pytest.raises(WorkerFailure, match=r"model\.gguf: the runtime gave no answer to 'logits' within 1 s"):
        worker.call("logits", {"tokens": np.zeros(1, dtype=np.int32)})
    assert time.monotonic() - started < 10
    assert not is_running(worker.pid)


def test_a_killed_worker_is_a_sentence_with_the_signal() -> None:
    worker = LocalWorker("model.gguf")
    os.kill(worker.pid, signal.SIGSTOP)
    threading.Timer(0.2, os.kill, (worker.pid, signal.SIGKILL)).start()
    with pytest.raises(WorkerFailure, match="SIGKILL"):
        worker.call("logits", {"tokens": np.zeros(1, dtype=np.int32)})
    assert not is_running(worker.pid)


def test_an_exception_in_the_worker_shows_its_last_lines() -> None:
    with LocalWorker("model.gguf") as worker, pytest.raises(WorkerFailure, match="KeyError"):
        worker.call("no such operation")


def test_a_worker_leaves_when_its_client_is_killed() -> None:
    with killed_client_of_worker(
        "from runtime_tests.transports.local import LocalWorker; worker = LocalWorker('x')"
    ) as pid:
        assert is_running(pid)
    wait_until(lambda: not is_running(pid), 10)


def test_peak_memory_is_the_workers_own_and_not_its_parents() -> None:
    held = b"x" * (800 << 20)
    script = "from runtime_tests.worker.__main__ import _peak_memory; print(_peak_memory())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert 1 << 20 < int(done.stdout) < len(held) // 2
