"""Where a binary runs: here, on a machine behind ssh, or on a phone behind adb. Only `sh` is needed there.

Every command is on a leash (`leashed_line`), so that it dies when the connection ends, also when we are killed. The
folder that files are pushed into is removed at the end.
"""

from __future__ import annotations

import contextlib
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol, Self

from devices import DeviceProfile
from runtime_tests.transports.adb_client import AdbPhone
from runtime_tests.transports.leash import leashed_line
from runtime_tests.transports.ssh_client import TRIES, SshClient
from signround_edge.errors import UserError, last_lines

# Below the one folder where Android lets the shell execute files.
_MAKE_FOLDER_ON_ANDROID = "mktemp -d /data/local/tmp/signround-XXXXXX"


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


class LocalHost:
    """This machine: files stay where they are."""

    def push(self, file: Path) -> str:
        return str(file.absolute())

    def run(self, command: Sequence[str], environment: dict[str, str], timeout: float) -> Finished:
        return _run(["sh", "-c", leashed_line(command, environment)], timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Client(Protocol):
    """A program on this machine that runs shell lines on another one.

    Attributes:
        program: its name.
        lost_code: its exit code when the connection, not the command, failed; None: it has none.
        address: of the other machine, as the program takes it.
    """

    program: ClassVar[str]
    lost_code: ClassVar[int | None]

    @property
    def address(self) -> str: ...

    def command(self, line: str) -> list[str]:
        """The command that runs a shell line there."""
        ...

    def run(self, line: str) -> subprocess.CompletedProcess[bytes]:
        """Run a shell line there to its end."""
        ...

    def push(self, file: Path, path: str) -> None:
        """Copy a file there, executable where it was. UserError when that fails."""
        ...

    def close(self) -> None:
        """Take back what the program changed here."""
        ...


class FarHost:
    """Another machine.

    Args:
        client: reaches it; closed at the end.
        make_folder: the shell line that makes our folder there and prints its path.
    Raises:
        UserError: nobody answers there.
    """

    def __init__(self, client: Client, make_folder: str = "mktemp -d") -> None:
        self._client = client
        done = client.run(make_folder)
        if done.returncode:
            client.close()
            said = last_lines(done.stderr.decode(errors="replace"), 1) or "no reason given"
            who = f"{client.program} {client.address}"
            raise UserError(f"{who}: {said}; check that the device is connected and allows this")
        self._folder = done.stdout.decode(errors="replace").strip()

    def push(self, file: Path) -> str:
        path = f"{self._folder}/{file.name}"
        self._client.push(file, path)
        return path

    def run(self, command: Sequence[str], environment: dict[str, str], timeout: float) -> Finished:
        line = leashed_line(command, environment, f"{self._folder}/said")
        for _ in range(TRIES):
            done = _run(self._client.command(line), timeout)
            if done.code != self._client.lost_code:
                return done
        said = last_lines(done.output, 1) or "no reason given"
        raise UserError(f"the {self._client.program} connection was lost {TRIES} times ({said})")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._client.run(f"rm -rf {shlex.quote(self._folder)}")
        self._client.close()


def host_of(profile: DeviceProfile) -> Host:
    """The host behind a profile. Raises UserError when binaries cannot be brought there."""
    if profile.transport == "local":
        return LocalHost()
    if profile.transport == "ssh" and profile.address:
        return FarHost(SshClient(profile.address))
    if profile.transport == "adb":
        return FarHost(AdbPhone(profile), _MAKE_FOLDER_ON_ANDROID)
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
