"""Workers over ssh: a real sshd on this machine, as the other machine; its cache folder is its own."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from devices import DeviceProfile, get_device
from exporters.interface import ExportOptions
from exporters.onnx import OnnxExporter
from runtime_tests.runtimes.llama_cpp import LlamaCppRuntime
from runtime_tests.runtimes.onnx_runtime import OnnxRuntime
from runtime_tests.transports.interface import WorkerFailure
from runtime_tests.transports.ssh import SshTransport
from runtime_tests.transports.ssh_client import OPTIONS_VARIABLE
from runtime_tests.verify import verify
from runtime_tests.worker import remote_store
from signround_edge.run_directory import RunDirectory
from tests.runtime_tests.processes import command_of, wait_until
from tests.runtime_tests.sshd import Sshd, free_port, running_sshd

pytestmark = pytest.mark.full
TOKENS = np.random.default_rng(0).integers(0, 300, 100).astype(np.int32)


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    with running_sshd(tmp_path_factory.mktemp("sshd")) as server:
        yield server


@pytest.fixture
def profile(sshd: Sshd, monkeypatch: pytest.MonkeyPatch) -> DeviceProfile:
    monkeypatch.setenv(OPTIONS_VARIABLE, sshd.options)
    return replace(get_device(f"raspberry-pi-5={sshd.address}"), timeout_s=300)


def workers(sshd: Sshd) -> list[int]:
    return [
        pid for pid in sshd.children() if "runtime_tests.worker" in command_of(pid) and "sh -c" not in command_of(pid)
    ]


def pushed(sshd: Sshd) -> dict[str, int]:
    return {f.name: f.stat().st_mtime_ns for f in (sshd.cache / "pushed").iterdir() if len(f.name) == 64}


def test_verify_passes_over_ssh_with_the_weights_read_there(
    sshd: Sshd, profile: DeviceProfile, run: RunDirectory, gguf_file: Path, onnx_folder: Path, text: Path
) -> None:
    device = f"raspberry-pi-5={sshd.address}"
    report = verify(run, [gguf_file, onnx_folder], text, devices=[device], n_ctx=64, max_windows=2, log=str)
    assert [(r.name, r.status, r.reason) for r in report.runtimes] == [
        ("llama.cpp", "pass", None),
        ("onnxruntime", "pass", None),
    ]
    assert report.passed
    assert workers(sshd) == []


def test_an_ort_file_that_rounds_activations_passes_over_ssh(
    sshd: Sshd, profile: DeviceProfile, run: RunDirectory, text: Path, tmp_path: Path
) -> None:
    """Its control is the same file at accuracy level 0, which is made there."""
    options = ExportOptions(accuracy_level=4, ort_format=True, log=str)
    file = OnnxExporter().export(run, tmp_path / "out", options) / "model.ort"
    report = verify(run, [file], text, devices=[f"raspberry-pi-5={sshd.address}"], n_ctx=64, max_windows=2, log=str)
    assert [(r.name, r.status, r.reason) for r in report.runtimes] == [("onnxruntime", "pass", None)]
    assert report.runtimes[0].control is not None


def test_an_artifact_is_pushed_once(sshd: Sshd, profile: DeviceProfile, gguf_file: Path) -> None:
    runtime = LlamaCppRuntime().on(profile, SshTransport(profile))
    with runtime.open(gguf_file) as session:
        first = session.logits(TOKENS)
        assert session.peak_memory_bytes
        assert session.seconds > 0
    before = pushed(sshd)
    assert hashlib.sha256(gguf_file.read_bytes()).hexdigest() in before
    with runtime.open(gguf_file) as session:
        np.testing.assert_array_equal(session.logits(TOKENS), first)
    assert pushed(sshd) == before
    with LlamaCppRuntime().open(gguf_file) as session:
        np.testing.assert_array_equal(session.logits(TOKENS), first)


def test_an_interrupted_push_goes_on_where_it_stopped(
    sshd: Sshd, profile: DeviceProfile, onnx_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = onnx_folder / "model.onnx.data"
    digest = hashlib.sha256(data.read_bytes()).hexdigest()
    store = sshd.cache / "pushed"
    store.mkdir(parents=True, exist_ok=True)
    (store / digest).unlink(missing_ok=True)
    half = data.stat().st_size // 2
    (store / f"{digest}.part").write_bytes(data.read_bytes()[:half])
    offsets: list[tuple[str, int]] = []
    from runtime_tests.transports.ssh import SshWorker

    give = SshWorker._give_worker

    def recorded(self: SshWorker, sha256: str, size: int, offset: int, content: bytes) -> int:
        offsets.append((sha256, offset))
        return give(self, sha256, size, offset, content)

    monkeypatch.setattr(SshWorker, "_give_worker", recorded)
    with OnnxRuntime().on(profile, SshTransport(profile)).open(onnx_folder) as session:
        assert session.logits(TOKENS).shape == (100, 300)
    assert min(offset for sha256, offset in offsets if sha256 == digest) == half
    assert (store / digest).read_bytes() == data.read_bytes()


def test_a_lost_connection_is_made_anew_and_the_run_goes_on(
    sshd: Sshd, profile: DeviceProfile, gguf_file: Path
) -> None:
    with LlamaCppRuntime().on(profile, SshTransport(profile)).open(gguf_file) as session:
        first = session.logits(TOKENS)
        sessions = [pid for pid in sshd.children() if command_of(pid).startswith("sshd")]
        assert sessions
        for pid in sessions:
            os.kill(pid, signal.SIGKILL)
        np.testing.assert_array_equal(session.logits(TOKENS), first)
        assert session.reconnections == 1
    wait_until_gone(sshd)


def test_a_killed_worker_is_a_failure_with_the_signal_and_is_not_tried_again(
    sshd: Sshd, profile: DeviceProfile, gguf_file: Path
) -> None:
    with LlamaCppRuntime().on(profile, SshTransport(profile)).open(gguf_file) as session:
        (pid,) = workers(sshd)
        os.kill(pid, signal.SIGSTOP)
        threading.Timer(0.3, os.kill, (pid, signal.SIGKILL)).start()
        with pytest.raises(WorkerFailure, match="SIGKILL"):
            session.logits(TOKENS)
        assert session.reconnections == 0
    wait_until_gone(sshd)


def test_a_hanging_worker_is_ended_there_too(sshd: Sshd, profile: DeviceProfile, gguf_file: Path) -> None:
    runtime = LlamaCppRuntime().on(replace(profile, timeout_s=20), SshTransport(profile))
    with runtime.open(gguf_file) as session:
        assert session._worker is not None
        session._worker._timeout = 1.0
        (pid,) = workers(sshd)
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(WorkerFailure, match="gave no answer"):
            session.logits(TOKENS)
        os.kill(pid, signal.SIGCONT)
    wait_until_gone(sshd)


def test_what_is_not_reachable_is_said(profile: DeviceProfile, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert SshTransport(profile).unavailable() is None
    nobody = replace(profile, address=f"root@127.0.0.1:{free_port()}")
    assert "nobody answers at root@127.0.0.1" in str(SshTransport(nobody).unavailable())
    assert "has no address" in str(SshTransport(replace(profile, address=None)).unavailable())
    monkeypatch.setenv(
        OPTIONS_VARIABLE, f"-F /dev/null -o StrictHostKeyChecking=no -o UserKnownHostsFile={tmp_path / 'k'}"
    )
    assert "cannot log in" in str(SshTransport(profile).unavailable())


def wait_until_gone(sshd: Sshd) -> None:
    wait_until(lambda: workers(sshd) == [], 10)


def test_a_file_with_another_hash_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIGNROUND_EDGE_CACHE", str(tmp_path))
    digest = hashlib.sha256(b"right").hexdigest()
    with pytest.raises(ValueError, match="push it again"):
        remote_store.put(digest, 5, 0, b"wrong")
    assert remote_store.have(digest, 5) == 0
    assert remote_store.put(digest, 5, 0, b"ri") == 2
    assert remote_store.put(digest, 5, 4, b"t") == 2
    assert remote_store.put(digest, 5, 2, b"ght") == 5
    assert list(remote_store.store().iterdir()) == [remote_store.store() / digest]
