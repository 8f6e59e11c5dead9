"""An Android phone on USB, through the system's `adb` client: the phone's own browser computes.

Nothing is installed on the phone. `adb reverse` brings our page's port to the phone's localhost, which browsers trust
(so that artifacts stay in its cache), and `am start` opens the page there; the rest is the browser transport. What was
not there before is taken back at the end: the forwarded port, and adb's server where we have started it.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
from collections.abc import Callable

from devices import DeviceProfile
from runtime_tests.setup.devices import ADB
from runtime_tests.transports.browser import PhoneTransport
from runtime_tests.transports.page_server import PageServer
from signround_edge.errors import UserError

_HOST = "127.0.0.1"
_DEFAULT_PORT = 5037
_SECONDS = 15.0  # adb answers at once, or after the five seconds that its server takes to start
_HOW = "plug the phone in, switch on USB debugging in its developer options, and allow this computer on its screen"


class AdbTransport(PhoneTransport):
    """A phone behind adb.

    Args:
        profile: its `address` is the phone's serial number (as `adb devices` shows it); needed with several phones.
        say: shows a line to the person.
    """

    def __init__(self, profile: DeviceProfile, say: Callable[[str], None] | None = None) -> None:
        super().__init__(profile, say)
        self._reversed: str | None = None  # the forwarded port, as adb names it
        self._serial = ""
        self._stop_server = False

    def unavailable(self) -> str | None:
        """Why no worker can be had: no adb, no phone, or one that has not allowed this computer."""
        if ADB.missing():
            return f"{ADB.missing()} ({ADB.command() or f'apt-get install -y {ADB.package}'})"
        was_running = _server_runs()
        try:
            self._find_phone()
        except UserError as error:
            return str(error)
        finally:
            if not was_running and self._server is None:
                _stop_server()
        return None

    def close(self) -> None:
        """Close the page, and take back what was changed."""
        super().close()
        if self._reversed is not None:
            _adb("-s", self._serial, "reverse", "--remove", self._reversed, check=False)
            self._reversed = None
        if self._stop_server:
            self._stop_server = False
            _stop_server()

    def _listen(self) -> PageServer:
        self._stop_server = not _server_runs()
        self._serial = self._find_phone()
        server = PageServer(_HOST)
        try:
            port = f"tcp:{server.port}"
            _adb("-s", self._serial, "reverse", port, port)
            self._reversed = port
            # The address holds no character that a shell reads.
            _adb("-s", self._serial, "shell", f"am start -a android.intent.action.VIEW -d {server.url}")
        except UserError:
            server.close()
            raise
        self._say(f"opened a page in the browser of the phone {self._serial}; keep its screen on")
        return server

    def _find_phone(self) -> str:
        """Serial number of the phone. UserError when there is none, or not one."""
        states = dict(line.split()[:2] for line in _adb("devices").splitlines()[1:] if len(line.split()) >= 2)
        wanted = self._profile.address
        if wanted:
            states = {serial: state for serial, state in states.items() if serial == wanted}
        if not states:
            raise UserError(f"adb sees no phone{f' {wanted}' if wanted else ''} ({_HOW})")
        if len(states) > 1:
            names = ", ".join(states)
            raise UserError(f"adb sees several phones, {names} (choose one: --device {self._profile.name}=SERIAL)")
        ((serial, state),) = states.items()
        if state != "device":
            raise UserError(f"the phone {serial} is {state} for adb ({_HOW})")
        return serial


def _adb(*arguments: str, check: bool = True) -> str:
    """Output of an adb command; UserError with its words when it fails."""
    try:
        done = subprocess.run(
            [ADB.path() or "adb", *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(f"adb {arguments[-1]} gave no answer within {_SECONDS:g} s ({_HOW})") from error
    if check and done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "no reason given").splitlines()[-1]
        raise UserError(f"adb could not do it ({said}); {_HOW}")
    return done.stdout


def _server_runs() -> bool:
    """Whether adb's server listens already; starting it is then not ours, nor stopping it."""
    port = int(os.environ.get("ANDROID_ADB_SERVER_PORT") or _DEFAULT_PORT)
    try:
        with socket.create_connection((_HOST, port), 1.0):
            return True
    except OSError:
        return False


def _stop_server() -> None:
    with contextlib.suppress(UserError):  # a server that hangs is not ours to wait for
        _adb("kill-server", check=False)
