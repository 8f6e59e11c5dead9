"""A phone on USB through the system's `adb` client. adb's server is stopped again where we have started it."""

from __future__ import annotations

import contextlib
import os
import shlex
import socket
import subprocess
from pathlib import Path
from typing import ClassVar

from devices import DeviceProfile
from runtime_tests.setup.devices import ADB
from signround_edge.errors import UserError, last_lines

_HOST = "127.0.0.1"
_DEFAULT_PORT = 5037
_SECONDS = 15.0  # adb answers at once, or after the five seconds that its server takes to start
_HOW = "plug the phone in, switch on USB debugging in its developer options, and allow this computer on its screen"


class AdbPhone:
    """The phone that a profile means.

    Args:
        profile: its `address` is the phone's serial number (as `adb devices` shows it); needed with several phones.
    Raises:
        UserError: no adb, no phone, several of them, or one that has not allowed this computer.

    Attributes:
        address: its serial number.
    """

    program: ClassVar[str] = "adb"
    lost_code: ClassVar[int | None] = None  # its client has no exit code of its own for that

    def __init__(self, profile: DeviceProfile) -> None:
        missing = ADB.missing_with_way_out()
        if missing:
            raise UserError(missing)
        self._started_server = not _server_runs()
        try:
            self.address = _serial_number(profile)
        except BaseException:
            self.close()
            raise

    def command(self, line: str) -> list[str]:
        """The command that runs a shell line there."""
        return [*self._adb(), "shell", line]

    def run(self, line: str) -> subprocess.CompletedProcess[bytes]:
        """Run a shell line there to its end."""
        return subprocess.run(self.command(line), stdin=subprocess.DEVNULL, capture_output=True, check=False)

    def call(self, *arguments: str, check: bool = True) -> None:
        """Run a command of adb about this phone; UserError with its words when it fails."""
        _call([*self._adb(), *arguments], _SECONDS, check)

    def push(self, file: Path, path: str) -> None:
        """Copy a file there, executable where it was. UserError when that fails."""
        _call([*self._adb(), "push", str(file), path])
        if os.access(file, os.X_OK):
            _call(self.command(f"chmod 700 {shlex.quote(path)}"))

    def close(self) -> None:
        """Stop adb's server where it did not run before. May be repeated."""
        if self._started_server:
            self._started_server = False
            with contextlib.suppress(UserError):  # a server that hangs is not ours to wait for
                _call([*_client(), "kill-server"], _SECONDS, check=False)

    def _adb(self) -> list[str]:
        return [*_client(), "-s", self.address]


def _client() -> list[str]:
    return [ADB.path() or "adb"]


def _serial_number(profile: DeviceProfile) -> str:
    """Of the one phone that can be meant. UserError when there is none, or not one."""
    listing = _call([*_client(), "devices"], _SECONDS)
    states = dict(line.split()[:2] for line in listing.splitlines()[1:] if len(line.split()) >= 2)
    wanted = profile.address
    if wanted:
        states = {serial: state for serial, state in states.items() if serial == wanted}
    if not states:
        raise UserError(f"adb sees no phone{f' {wanted}' if wanted else ''} ({_HOW})")
    if len(states) > 1:
        names = ", ".join(states)
        raise UserError(f"adb sees several phones, {names} (choose one: --device {profile.name}=SERIAL)")
    ((serial, state),) = states.items()
    if state != "device":
        raise UserError(f"the phone {serial} is {state} for adb ({_HOW})")
    return serial


def _call(command: list[str], seconds: float | None = None, check: bool = True) -> str:
    """What a command of adb says; UserError with its words when it fails or takes too long."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=seconds
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(f"adb {command[-1]} gave no answer within {seconds:g} s ({_HOW})") from error
    if check and done.returncode:
        said = last_lines(done.stderr, 1) or last_lines(done.stdout, 1) or "no reason given"
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
