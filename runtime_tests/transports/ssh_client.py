"""Another machine through the system's ssh client: the command that reaches it, and short errands there."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from runtime_tests.setup.devices import SSH
from signround_edge.errors import UserError, last_lines

OPTIONS_VARIABLE = "SIGNROUND_EDGE_SSH_OPTIONS"  # more options of ssh, such as "-i key" or "-F config"
CONNECTION_LOST = 255  # the exit code of ssh when the connection, not the command, failed
TRIES = 3
_OPTIONS = ("BatchMode=yes", "ConnectTimeout=10", "ServerAliveInterval=5", "ServerAliveCountMax=4")
_PROBE_SECONDS = 2.0


@dataclass(frozen=True)
class SshClient:
    """One machine.

    Attributes:
        address: user@host or user@host:port; a host may be a name of ~/.ssh/config.
    """

    address: str
    program: ClassVar[str] = "ssh"
    lost_code: ClassVar[int | None] = CONNECTION_LOST

    def command(self, line: str) -> list[str]:
        """The command that runs a shell line there."""
        return [*self._ssh(), line]

    def run(self, line: str) -> subprocess.CompletedProcess[bytes]:
        """Run a shell line there to its end."""
        return subprocess.run(self.command(line), stdin=subprocess.DEVNULL, capture_output=True, check=False)

    def push(self, file: Path, path: str) -> None:
        """Copy a file there, readable by us alone, and executable where it was. UserError when that fails."""
        quoted, mode = shlex.quote(path), "700" if os.access(file, os.X_OK) else "600"
        line = f"cat > {quoted} && chmod {mode} {quoted} && wc -c < {quoted}"
        for _ in range(TRIES):
            with file.open("rb") as content:
                done = subprocess.run(self.command(line), stdin=content, capture_output=True, check=False)
            if done.returncode == 0 and int(done.stdout) == file.stat().st_size:
                return
            if done.returncode != CONNECTION_LOST:
                break
        said = last_lines(done.stderr.decode(errors="replace"), 1) or "no reason given"
        raise UserError(f"{file.name} could not be pushed over ssh ({said}); check space and connection")

    def answers(self) -> bool:
        """Whether a TCP connection comes about. True where only ssh can tell: behind a jump host."""
        ssh, *options = self._ssh()
        listing = subprocess.run([ssh, "-G", *options], capture_output=True, text=True, check=False).stdout
        settings = {key: value for key, _, value in (line.partition(" ") for line in listing.splitlines())}
        if settings.get("proxycommand", "none") != "none" or "proxyjump" in settings:
            return True
        try:
            with socket.create_connection((settings["hostname"], int(settings["port"])), _PROBE_SECONDS):
                return True
        except (OSError, KeyError, ValueError):
            return False

    def close(self) -> None:
        """Nothing is held: every errand is a connection of its own."""

    def _ssh(self) -> list[str]:
        """All of the command but what to run there."""
        host, colon, port = self.address.rpartition(":")
        if not (colon and port.isdigit() and ":" not in host):
            host, port = self.address, ""
        options = [part for option in _OPTIONS for part in ("-o", option)]
        more = shlex.split(os.environ.get(OPTIONS_VARIABLE, ""))
        return [SSH.path() or "ssh", "-T", *options, *more, *(["-p", port] if port else []), "--", host]
