"""Where a binary runs: here, on a machine behind ssh, or on a phone behind adb. Only `sh` is needed there.

Every command is on a leash: it runs beside a `cat` that reads the connection, and dies when that ends, also when we
are killed. The folder that files are pushed into is removed at the end.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

from devices import DeviceProfile
from runtime_tests.setup.devices import ADB
from runtime_tests.transports.ssh import CONNECTION_LOST, ssh_command
from signround_edge.errors import UserError

_ADB_FOLDER = "/data/local/tmp"  # the one place where Android lets the shell execute files
_TRIES = 3


@dataclass(frozen=True)
class Finished:
    """A command that has ended: its exit code (negative: signal), and all that it said on both streams."""

    code: int
    output: str


class Host(Protocol):
    """One device, and a folder of ours on it. Use as a context manager."""

    def push(self, file: Path) -> str:
        """Bring a file there, executable where it was; its path there."""
        ...

    def run(self, command: Sequence[str], environment: dict[str, str], timeout: float) -> Finished:
        """Run a command there. Raises UserError when it hangs or the connection is lost for good."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


def leashed(command: Sequence[str], environment: dict[str, str], output: str | None = None) -> str:
    """A shell line that runs a command until it ends, or until the shell's stdin does.

    Args:
        command: the program and its arguments.
        environment: set for it besides what is there.
        output: file there that takes what it says on both streams, shown when it has ended; None: said at once.
    """
    setting = " ".join(f"{name}={shlex.quote(value)}" for name, value in environment.items())
    line = f"{setting} {shlex.join(command)}".strip()
    to_file, show = (f" >{shlex.quote(output)} 2>&1", f"cat {shlex.quote(output)}; ") if output else ("", "")
    return (
        f"exec 3<&0; {line} </dev/null{to_file} & p=$!; "
        "(cat <&3 >/dev/null 2>&1; kill -9 $p) >/dev/null 2>&1 & w=$!; "
        f"wait $p; c=$?; kill $w 2>/dev/null; {show}exit $c"
    )


class LocalHost:
    """This machine: files stay where they are."""

    def push(self, file: Path) -> str:
        return str(file.absolute())

    def run(self, command: Sequence[str], environment: dict[str, str], timeout: float) -> Finished:
        return _run(["sh", "-c", leashed(command, environment)], timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class SshHost:
    """Another machine, through the system's ssh client.

    Args:
        address: user@host or user@host:port.
    Raises:
        UserError: nobody answers there.
    """

    def __init__(self, address: str) -> None:
        self._ssh = ssh_command(address)
        self._folder = _checked(self._sh("mktemp -d"), f"ssh {address}").strip()

    def push(self, file: Path) -> str:
        path = f"{self._folder}/{file.name}"
        mode = "700" if os.access(file, os.X_OK) else "600"
        line = f"cat > {shlex.quote(path)} && chmod {mode} {shlex.quote(path)} && wc -c < {shlex.quote(path)}"
        for attempt in range(_TRIES):
            with file.open("rb") as content:
                done = subprocess.run([*self._ssh, line], stdin=content, capture_output=True, check=False)
            if done.returncode == 0 and int(done.stdout) == file.stat().st_size:
                return path
            if done.returncode != CONNECTION_LOST or attempt == _TRIES - 1:
                break
        raise UserError(
            f"{file.name} could not be pushed over ssh ({_last_line(done.stderr)}); check space and connection"
        )

    def run(self, command: Sequence[str], environment: dict[str, str], timeout: float) -> Finished:
        for _ in range(_TRIES):
            done = _run([*self._ssh, leashed(command, environment, f"{self._folder}/said")], timeout)
            if done.code != CONNECTION_LOST:
                return done
        raise UserError(f"the ssh connection was lost {_TRIES} times ({_last_line(done.output.encode())})")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._sh(f"rm -rf {shlex.quote(self._folder)}")

    def _sh(self, line: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run([*self._ssh, line], stdin=subprocess.DEVNULL, capture_output=True, check=False)


class AdbHost:
    """An Android device, through the system's adb client.

    Args:
        serial: as `adb devices` lists it; empty takes the only one.
    Raises:
        UserError: no adb, or no device.
    """

    def __init__(self, serial: str) -> None:
        program = ADB.path()
        if program is None:
            raise UserError(f"{ADB.missing()} (apt-get install -y {ADB.package})")
        self._adb = [program, *(["-s", serial] if serial else [])]
        line = f"mktemp -d {_ADB_FOLDER}/signround-XXXXXX"
        self._folder = _checked(self._call("shell", line), f"adb {serial}").strip()

    def push(self, file: Path) -> str:
        path = f"{self._folder}/{file.name}"
        _checked(self._call("push", str(file), path), "adb push")
        if os.access(file, os.X_OK):
            _checked(self._call("shell", f"chmod 700 {shlex.quote(path)}"), "adb shell")
        return path

    def run(self, command: Sequence[str], environment: dict[str, str], timeout: float) -> Finished:
        return _run([*self._adb, "shell", leashed(command, environment, f"{self._folder}/said")], timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._call("shell", f"rm -rf {shlex.quote(self._folder)}")

    def _call(self, *arguments: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run([*self._adb, *arguments], stdin=subprocess.DEVNULL, capture_output=True, check=False)


def host_of(profile: DeviceProfile) -> Host:
    """The host behind a profile. Raises UserError when binaries cannot be brought there."""
    address = profile.address or ""
    if profile.transport == "local":
        return LocalHost()
    if profile.transport == "ssh" and address:
        return SshHost(address)
    if profile.transport == "adb":
        return AdbHost(address)
    raise UserError(
        f"--llama-bin runs binaries locally, over ssh (with an address) and adb, not over {profile.transport}"
    )


def _run(command: Sequence[str], timeout: float) -> Finished:
    """Run with a stdin that stays open, so that the leash ends with us."""
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=output, stderr=output)
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired as error:
            raise UserError(f"it gave no answer within {timeout:g} s and was ended") from error
        finally:
            # The leash lets go of the command when its stdin ends; then the shell ends too.
            assert process.stdin is not None
            process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
            process.kill()
            process.wait()
        output.seek(0)
        return Finished(code, output.read().decode(errors="replace"))


def _checked(done: subprocess.CompletedProcess[bytes], what: str) -> str:
    if done.returncode:
        raise UserError(f"{what}: {_last_line(done.stderr)}; check that the device is connected and allows this")
    return done.stdout.decode(errors="replace")


def _last_line(said: bytes) -> str:
    return (said.decode(errors="replace").strip().splitlines() or ["no reason given"])[-1]
