"""onnxruntime-web and onnxruntime-node in Node: real packages, real verify."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import numpy as np
import pytest

from exporters.onnx import OnnxExporter
from exporters.onnx.options import OnnxOptions
from runtime_tests.runtimes.onnx_javascript import OnnxRuntimeNode, OnnxRuntimeWeb
from runtime_tests.runtimes.onnx_runtime import OnnxRuntime
from runtime_tests.transports.interface import WorkerFailure
from runtime_tests.transports.node import LeashedWorker, NodeTransport
from runtime_tests.verify import verify
from runtime_tests.worker.digest import digest_of
from signround_edge.errors import UserError
from signround_edge.run_directory import RunDirectory
from tests.runtime_tests.javascript_support import ready_device
from tests.runtime_tests.processes import command_of, descendants, killed_client_of_worker, wait_until
from tests.support import make_run

TOKENS = np.random.default_rng(0).integers(0, 300, 48).astype(np.int32)


@pytest.fixture
def web() -> OnnxRuntimeWeb:
    return OnnxRuntimeWeb().on(ready_device("node-wasm"), NodeTransport())


def test_verify_passes_in_node_with_the_weights_read_by_its_kernels(
    web: OnnxRuntimeWeb, run: RunDirectory, onnx_folder: Path, text: Path
) -> None:
    report = verify(run, [onnx_folder], text, devices=["node-wasm"], n_ctx=64, max_windows=2, log=str)
    (runtime,) = report.runtimes
    assert (runtime.name, runtime.status, runtime.gate, runtime.reason) == ("onnxruntime-web", "pass", "exact", None)
    assert report.weights_exact


def test_its_logits_and_digests_are_those_of_onnx_runtime(web: OnnxRuntimeWeb, onnx_folder: Path) -> None:
    with OnnxRuntime().open(onnx_folder) as session:
        expected = session.logits(TOKENS)
    with web.open(onnx_folder) as session:
        found = session.logits(TOKENS)
        scored = session.scored(TOKENS, 24)
        assert session.vocab_size == expected.shape[1]
        assert session.peak_memory_bytes
        session._digest = True
        digest = session.scored(TOKENS, 24)
    assert float(np.abs(found - expected).max()) < 1e-3
    np.testing.assert_array_equal(scored, found[24:-1])
    ours = digest_of(found[24:-1], TOKENS[25:], 256)
    np.testing.assert_array_equal(digest.top_ids, ours.top_ids)
    for name in ("top_logp", "rest_logp", "loss"):
        np.testing.assert_allclose(getattr(digest, name), getattr(ours, name), rtol=1e-5, atol=1e-5)


def test_logits_in_f16_are_read_as_numbers(web: OnnxRuntimeWeb, small_model: Path, text: Path, tmp_path: Path) -> None:
    run = make_run(small_model, tmp_path / "run", "onnx:w4g32")
    folder = OnnxExporter().export(run, tmp_path / "half", OnnxOptions(io_dtype="f16", log=str))
    with OnnxRuntime().open(folder) as native, web.open(folder) as session:
        np.testing.assert_allclose(session.logits(TOKENS), native.logits(TOKENS), atol=0.1)
    assert verify(run, [folder], text, devices=["node-wasm"], n_ctx=64, max_windows=1, log=str).passed


@pytest.mark.full
def test_wasm_ignores_the_accuracy_level(web: OnnxRuntimeWeb, onnx_folder: Path, onnx_int8_folder: Path) -> None:
    with web.open(onnx_folder) as floats, web.open(onnx_int8_folder) as int8:
        np.testing.assert_array_equal(floats.logits(TOKENS), int8.logits(TOKENS))


@pytest.mark.full
def test_onnxruntime_node_verifies(run: RunDirectory, onnx_folder: Path, text: Path) -> None:
    ready_device("node-native")
    report = verify(run, [onnx_folder], text, devices=["node-native"], n_ctx=64, max_windows=2, log=str)
    assert [(r.name, r.status, r.reason) for r in report.runtimes] == [("onnxruntime-node", "pass", None)]
    with pytest.raises(UserError, match="at its own accuracy level only"):
        OnnxRuntimeNode().open(onnx_folder, accuracy_level=0)


@pytest.mark.full
def test_standard_operators_run_at_the_folders_level(run: RunDirectory, text: Path, tmp_path: Path) -> None:
    """ONNX Runtime's own default would round activations, and onnxruntime-node would be 1e-4 off."""
    ready_device("node-native")
    ready_device("node-wasm")
    folder = OnnxExporter().export(run, tmp_path / "qdq", OnnxOptions(operators="qdq", log=str))
    report = verify(run, [folder], text, devices=["node-native", "node-wasm"], n_ctx=64, max_windows=2, log=str)
    found = [(r.name, r.status, r.gate, r.reason) for r in report.runtimes]
    assert found == [("onnxruntime-node", "pass", "exact", None), ("onnxruntime-web", "pass", "exact", None)]
    assert report.weights_exact


def test_a_file_that_onnx_runtime_refuses_is_one_sentence(
    web: OnnxRuntimeWeb, onnx_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "model.onnx").write_bytes((onnx_folder / "model.onnx").read_bytes())
    (tmp_path / "model.onnx.data").write_bytes(b"\0" * (onnx_folder / "model.onnx.data").stat().st_size)
    content = (onnx_folder / "model.onnx").read_bytes()
    (tmp_path / "model.onnx").write_bytes(content.replace(b"MatMulNBits", b"MatMulNBots"))
    with pytest.raises(UserError, match="ONNX Runtime refuses the model"):
        web.open(tmp_path)


def test_an_operation_that_it_lacks_is_one_sentence(web: OnnxRuntimeWeb) -> None:
    with web.transport.start("x", 60) as worker, pytest.raises(UserError, match="cannot do tokenize"):
        worker.call("tokenize")


def test_a_killed_node_is_a_failure_with_its_signal(web: OnnxRuntimeWeb, onnx_folder: Path) -> None:
    with web.open(onnx_folder) as session:
        worker = session._worker
        assert isinstance(worker, LeashedWorker)
        (node,) = [pid for pid in descendants(worker.pid) if "node_worker" in command_of(pid)]
        os.kill(node, signal.SIGSTOP)
        threading.Timer(0.2, os.kill, (node, signal.SIGKILL)).start()
        with pytest.raises(WorkerFailure, match="SIGKILL"):
            session.logits(TOKENS)
    assert not command_of(node)


def test_a_hanging_node_is_ended(web: OnnxRuntimeWeb) -> None:
    worker = NodeTransport().start("model", timeout=2.0)
    wait_until(lambda: descendants(worker.pid))
    (node,) = descendants(worker.pid)
    os.kill(node, signal.SIGSTOP)
    with pytest.raises(WorkerFailure, match="gave no answer to 'logits' within 2 s"):
        worker.call("logits", {"tokens": TOKENS})
    assert not command_of(node)


def test_node_ends_when_its_client_is_killed() -> None:
    script = "from runtime_tests.transports.node import NodeTransport; worker = NodeTransport().start('x')"
    with killed_client_of_worker(script) as leash:
        wait_until(lambda: descendants(leash))
        (node,) = descendants(leash)
    wait_until(lambda: not command_of(node) and not command_of(leash))
