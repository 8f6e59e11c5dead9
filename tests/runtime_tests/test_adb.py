"""Phones over adb: the real `adb` client against a small server that speaks its wire protocol."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from devices import DeviceProfile, get_device
from runtime_tests.transports.pages.adb import AdbTransport
from runtime_tests.verify import verify
from signround_edge.errors import UserError
from signround_edge.run_directory import RunDirectory
from tests.runtime_tests.adb_server import AdbServer, Phone
from tests.runtime_tests.javascript_support import assert_both_pass, phone_browser, ready_device
from tests.runtime_tests.sshd import free_port, listens

PORT = "ANDROID_ADB_SERVER_PORT"

pytestmark = pytest.mark.skipif(shutil.which("adb") is None, reason="adb is not installed (apt-get install adb)")


@pytest.fixture
def profile() -> DeviceProfile:
    return replace(get_device("pixel-8"), timeout_s=120)


@pytest.mark.parametrize(
    ("phones", "address", "why"),
    [
        ([], None, "adb sees no phone"),
        ([Phone(state="unauthorized")], None, "FAKE123 is unauthorized"),
        ([Phone("A1"), Phone("B2")], None, "several phones, A1, B2"),
        ([Phone("A1"), Phone("B2")], "C3", "no phone C3"),
        ([Phone("A1"), Phone("B2")], "B2", None),
        ([Phone()], None, None),
    ],
)
def test_which_phone(
    phones: list[Phone], address: str | None, why: str | None, profile: DeviceProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    with AdbServer(*phones) as server:
        monkeypatch.setenv(PORT, str(server.port))
        found = AdbTransport(replace(profile, address=address)).unavailable()
        assert not server.killed  # it ran before us
    assert found is None if why is None else why in str(found)


def test_a_page_that_cannot_be_opened_is_said_and_taken_back(
    profile: DeviceProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    with AdbServer(Phone()) as server:
        monkeypatch.setenv(PORT, str(server.port))
        server.phones[0].shell = lambda command: "Starting"
        transport = AdbTransport(profile, said.append)
        with pytest.raises(UserError, match=r"nobody opened the page within 0\.5 s"):
            transport.start("model", timeout=0.5)
        (forwarded,) = server.phones[0].reversed
        assert listens(int(forwarded.removeprefix("tcp:")))
        transport.close()
        assert server.phones[0].reversed == {}
        assert not listens(int(forwarded.removeprefix("tcp:")))
    assert said == ["opened a page in the browser of the phone FAKE123; keep its screen on"]


def test_a_server_that_we_started_is_stopped(profile: DeviceProfile, monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    monkeypatch.setenv(PORT, str(port))
    assert "adb sees no phone" in str(AdbTransport(profile).unavailable())
    assert not listens(port)


@pytest.mark.full
def test_a_phone_on_usb_verifies_in_its_own_browser(
    run: RunDirectory, gguf_file: Path, onnx_folder: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`am start` opens headless Chromium at phone size, and the forwarded port is this machine's own."""
    ready_device("pixel-8")
    ready_device("browser-wasm")

    def shell(command: str) -> str:
        assert command.startswith("am start -a android.intent.action.VIEW -d http://127.0.0.1:")
        visit(command.split()[-1])
        return "Starting: Intent { act=android.intent.action.VIEW }\n"

    phone = Phone(shell=shell)
    with AdbServer(phone) as server, phone_browser() as visit:
        monkeypatch.setenv(PORT, str(server.port))
        report = verify(run, [gguf_file, onnx_folder], text, devices=["pixel-8"], n_ctx=32, max_windows=2, log=str)
    assert_both_pass(report)
    assert phone.reversed == {}
    forwarded = next(r for r in phone.requests if r.startswith("reverse:forward:"))
    assert not listens(urlsplit(f"//x:{forwarded.rpartition(':')[2]}").port or 0)
