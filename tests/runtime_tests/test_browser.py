"""onnxruntime-web and wllama in headless Chromium, and the page that a phone opens."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest

from devices import DeviceProfile, get_device
from runtime_tests.runtimes.llama_cpp import LlamaCppRuntime
from runtime_tests.runtimes.onnx_javascript import OnnxRuntimeWeb
from runtime_tests.runtimes.wllama import WllamaRuntime
from runtime_tests.runtimes.worker_session import WorkerSession
from runtime_tests.transports.interface import ConnectionLost, WorkerFailure
from runtime_tests.transports.pages import browser as browser_module
from runtime_tests.transports.pages.browser import Chromium, ChromiumTransport, PhoneTransport
from runtime_tests.transports.pages.phone import listening_address, qr_code
from runtime_tests.transports.pages.server import PageServer
from runtime_tests.verify import verify
from runtime_tests.worker.digest import Digest
from signround_edge.errors import UserError
from signround_edge.evaluation.metrics import Windows, log_softmax
from signround_edge.run_directory import RunDirectory
from tests.runtime_tests.javascript_support import assert_both_pass, phone_browser, ready_device
from tests.runtime_tests.processes import command_of, descendants, wait_until
from tests.runtime_tests.sshd import listens

TOKENS = np.random.default_rng(0).integers(0, 300, 32).astype(np.int32)


def chromium_profile() -> DeviceProfile:
    return ready_device("browser-wasm")


# ---- the server, without a browser


@pytest.fixture
def server() -> Iterator[PageServer]:
    server = PageServer("127.0.0.1")
    yield server
    server.close()
    server.close()


def get(server: PageServer, path: str, cookie: str | None = None, **headers: str) -> tuple[int, bytes, str | None]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    connection.request("GET", path, headers={**({"Cookie": cookie} if cookie else {}), **headers})
    response = connection.getresponse()
    content = response.read()
    given = response.getheader("Set-Cookie")
    connection.close()
    return response.status, content, given.split(";")[0] if given else None


def test_only_the_browser_that_came_first_may_come_in(server: PageServer) -> None:
    base = f"/{server.token}/"
    assert get(server, "/")[0] == 404
    assert get(server, "/guess/")[0] == 404
    assert get(server, f"{base}js/page.mjs")[0] == 403
    status, page, cookie = get(server, base)
    assert status == 200
    assert b"signround-edge" in page
    assert cookie is not None
    assert get(server, base, cookie)[0] == 200
    assert get(server, f"{base}js/page.mjs", cookie)[0] == 200
    assert get(server, base)[0] == 403
    assert get(server, base, "signround=guess")[0] == 403


def test_the_server_gives_out_nothing_else(server: PageServer, tmp_path: Path) -> None:
    base = f"/{server.token}/"
    _, _, cookie = get(server, base)
    for path in (
        "js/../__init__.py",
        "js/__init__.py",
        "packages/wllama/../../../x.js",
        "packages/os/x.js",
        "files/x/y",
    ):
        assert get(server, base + path, cookie)[0] == 404
    file = tmp_path / "model.onnx"
    file.write_bytes(b"0123456789")
    offered = server.offer([file])
    assert get(server, f"{base}{offered}model.onnx", cookie)[1] == b"0123456789"
    assert get(server, f"{base}{offered}model.onnx", cookie, Range="bytes=4-")[:2] == (206, b"456789")
    assert get(server, f"{base}{offered}other.onnx", cookie)[0] == 404
    assert server.offer([file]) == offered


def test_a_closed_server_listens_no_more() -> None:
    server = PageServer("127.0.0.1")
    port = server.port
    assert listens(port)
    server.close()
    assert not listens(port)


def test_where_to_listen() -> None:
    assert listening_address("127.0.0.1:8080") == ("127.0.0.1", 8080)
    assert listening_address("127.0.0.1") == ("127.0.0.1", 0)
    with pytest.raises(UserError, match="HOST:PORT"):
        listening_address("127.0.0.1:http")
    host, port = listening_address(None)
    assert re.fullmatch(r"[0-9.]+", host)
    assert port == 0


def test_the_qr_code_is_drawn_for_a_terminal() -> None:
    lines = qr_code("http://192.168.1.20:45791/YXH_mKDtPAkNaJIBnSXUSQ/").splitlines()
    assert 10 < len(lines) < 25
    assert max(map(len, lines)) < 60
    assert set("".join(lines)) <= set(" █▀▄")


def test_nobody_opens_the_page() -> None:
    transport = PhoneTransport(replace(get_device("phone-browser"), address="127.0.0.1"), say=str)
    with pytest.raises(WorkerFailure, match=r"nobody opened the page within 0\.3 s"):
        transport.start("model", timeout=0.3)
    transport.close()


# ---- with a browser


@pytest.mark.full
def test_both_runtimes_verify_in_chromium(run: RunDirectory, gguf_file: Path, onnx_folder: Path, text: Path) -> None:
    chromium_profile()
    report = verify(run, [gguf_file, onnx_folder], text, devices=["browser-wasm"], n_ctx=32, max_windows=2, log=str)
    assert_both_pass(report)
    assert report.weights_exact


@pytest.mark.full
def test_wllama_gives_llama_cpps_distributions(gguf_file: Path) -> None:
    profile = chromium_profile()
    with LlamaCppRuntime().open(gguf_file) as session:
        here = log_softmax(session.scored(TOKENS, 16))  # type: ignore[arg-type]
    with WllamaRuntime().on(profile, ChromiumTransport()).open(gguf_file) as session:
        there = log_softmax(session.scored(TOKENS, 16))  # type: ignore[arg-type]
    assert float((np.exp(here) * (here - there)).sum(-1).mean()) < 0.01


@pytest.mark.full
def test_a_file_that_a_browser_refuses_is_one_sentence(gguf_file: Path, tmp_path: Path) -> None:
    profile = chromium_profile()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(gguf_file.read_bytes())
    runtime = WllamaRuntime().on(profile, ChromiumTransport())
    with open(cut, "r+b") as file:
        file.seek(4)
        file.write(b"\x63")  # a version of GGUF that there is not
    with pytest.raises(UserError, match=r"cut\.gguf"):
        runtime.open(cut)


@pytest.mark.full
def test_a_killed_browser_is_a_failure_and_leaves_nothing(
    onnx_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    profile = chromium_profile()
    monkeypatch.setattr(browser_module.tempfile, "tempdir", str(tmp_path))
    started: list[Chromium] = []

    class Recorded(Chromium):
        def __init__(self, *arguments: object, **named: object) -> None:
            super().__init__(*arguments, **named)  # type: ignore[arg-type]
            started.append(self)

    monkeypatch.setattr(browser_module, "Chromium", Recorded)
    with OnnxRuntimeWeb().on(profile, ChromiumTransport()).open(onnx_folder) as session:
        below = descendants(started[0].pid)
        assert below
        threading.Timer(0.01, os.kill, (below[0], signal.SIGKILL)).start()
        with pytest.raises(WorkerFailure, match="the browser ended"):
            keep_computing(session)
    wait_until(lambda: not any(command_of(pid) for pid in below))
    wait_until(lambda: not list(tmp_path.glob("signround-chromium-*")))


@pytest.mark.full
def test_a_phone_verifies_and_nothing_listens_after(
    run: RunDirectory, gguf_file: Path, onnx_folder: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole route: address and QR code said, a browser at phone size opens it, digests come back."""
    ready_device("phone-browser")
    chromium_profile()
    said: list[str] = []
    with phone_browser() as visit:

        def person(line: str) -> None:
            said.append(line)
            if line.startswith("http://"):
                visit(line)

        monkeypatch.setattr(browser_module.PhoneTransport.__init__, "__defaults__", (person,))
        report = verify(
            run, [gguf_file, onnx_folder], text, devices=["phone-browser=127.0.0.1"], n_ctx=32, max_windows=2, log=str
        )
    assert_both_pass(report)
    (address,) = [line for line in said if line.startswith("http://")]
    assert any("█" in line for line in said)
    assert not listens(urlsplit(address).port or 0)


@pytest.mark.full
def test_a_page_that_is_loaded_again_goes_on(onnx_folder: Path) -> None:
    """A phone drops a page from memory; the person opens it again, and the run goes on where it was."""
    ready_device("phone-browser")
    chromium_profile()
    addresses: list[str] = []
    profile = replace(get_device("phone-browser"), address="127.0.0.1", timeout_s=120)
    transport = PhoneTransport(profile, say=addresses.append)
    runtime = OnnxRuntimeWeb().on(profile, transport)
    windows = Windows(np.random.default_rng(1).integers(0, 300, (3, 32)).astype(np.int32))
    opened, reopened = threading.Event(), threading.Event()

    def person() -> None:
        wait_until(lambda: any(a.startswith("http") for a in addresses))
        url = next(a for a in addresses if a.startswith("http"))
        first = visit(url)
        opened.wait(60)
        first.close()
        # The browser's cookie went with its profile; a phone's stays.
        transport._server.cookie_given = False  # type: ignore[union-attr]
        visit(url)
        reopened.set()

    thread = threading.Thread(target=person)
    with contextlib.closing(transport), phone_browser() as visit:
        thread.start()
        try:
            with runtime.open(onnx_folder) as session:
                before = session.scored(windows.tokens[0], 16)
                opened.set()
                wait_until(reopened.is_set)
                after = session.scored(windows.tokens[0], 16)
                assert session.reconnections >= 1
            assert isinstance(before, Digest)
            assert isinstance(after, Digest)
            np.testing.assert_array_equal(before.top_ids, after.top_ids)
        finally:
            opened.set()
            thread.join()
    assert issubclass(ConnectionLost, WorkerFailure)


def keep_computing(session: WorkerSession) -> None:
    for _ in range(1000):
        session.logits(TOKENS)
