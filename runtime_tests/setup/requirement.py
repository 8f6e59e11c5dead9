"""What a requirement is, and the ones that the system's package manager serves."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from signround_edge.errors import UserError, last_lines

Log = Callable[[str], None]


class Requirement(Protocol):
    """Something that a device needs on this machine."""

    def missing(self) -> str | None:
        """What is missing, in one clause; None when nothing is."""
        ...

    def command(self) -> str | None:
        """The shell command that a person must run first because `--setup` cannot; None when `--setup` can do it."""
        ...

    def install(self, log: Log) -> None:
        """Get it. UserError when that fails, with the way out."""
        ...


@dataclass(frozen=True)
class SystemProgram:
    """A program on PATH, installed through apt where we may.

    Attributes:
        names: names of the program, any of which serves.
        package: its Debian package.
    """

    names: tuple[str, ...]
    package: str

    def path(self) -> str | None:
        """Where it is, or None."""
        return next((found for name in self.names if (found := shutil.which(name))), None)

    def missing(self) -> str | None:
        """See `Requirement`."""
        return None if self.path() else f"the program {self.names[0]} is not installed"

    def missing_with_way_out(self) -> str | None:
        """The same with the command that installs it."""
        missing = self.missing()
        return f"{missing} ({self.command() or f'apt-get install -y {self.package}'})" if missing else None

    def command(self) -> str | None:
        """See `Requirement`: nothing where apt-get can be run as it is."""
        return None if self.path() or _may_apt() else f"sudo apt-get install -y {self.package}"

    def install(self, log: Log) -> None:
        """apt-get install, as root only."""
        if not _may_apt():
            raise UserError(f"{self.missing()}; run `{self.command()}` (or your system's way to install it) first")
        log(f"apt-get install {self.package}")
        run_tool(["apt-get", "install", "-y", "--no-install-recommends", self.package], "apt-get")


def run_tool(command: Sequence[str], what: str, **environment: str) -> str:
    """Run an installer and return its output; UserError with its last words when it fails."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "DEBIAN_FRONTEND": "noninteractive", **environment},
        )
    except OSError as error:
        raise UserError(f"{what} cannot be run ({error.strerror}); install it first") from error
    output = done.stdout.decode(errors="replace")
    if done.returncode:
        raise UserError(f"{what} failed ({last_lines(output, 2)}); check the network and try again")
    return output


def _may_apt() -> bool:
    return hasattr(os, "geteuid") and os.geteuid() == 0 and shutil.which("apt-get") is not None
