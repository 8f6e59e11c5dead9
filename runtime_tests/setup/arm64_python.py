"""An arm64 Linux with Python for qemu's user mode: Debian packages, unpacked without installing anything.

apt-get of this machine resolves and downloads them with a state of its own in the cache, so that the system's package
lists and architectures stay as they are; no root is needed.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from runtime_tests.setup.cache import cache_folder, fill
from runtime_tests.setup.requirement import Log, run_tool
from signround_edge.errors import UserError

_PACKAGES = ("python3-minimal", "libpython3-stdlib", "libstdc++6", "libgomp1")
_EDITION = "1"  # of what the folder holds
_EMULATOR = "qemu-aarch64-static"


@dataclass(frozen=True)
class Arm64Python:
    """The root folder of the emulated machine."""

    @property
    def folder(self) -> Path:
        """Its root."""
        return cache_folder() / "debian" / f"arm64-python-{_EDITION}"

    @property
    def interpreter(self) -> Path:
        """The interpreter, once the folder is there."""
        return (self.folder / "usr" / "bin" / "python3").resolve()

    @property
    def version(self) -> str:
        """Its version, such as "3.11"."""
        return self.interpreter.name.removeprefix("python")

    def missing(self) -> str | None:
        """See `Requirement`."""
        return None if self.folder.is_dir() else "an arm64 Python to emulate is not in the cache"

    def command(self) -> str | None:
        """See `Requirement`."""
        return None

    def install(self, log: Log) -> None:
        """Download and unpack; UserError on a system without apt-get and dpkg-deb."""
        log(f"downloading {', '.join(_PACKAGES)} for arm64 from Debian")
        fill(self.folder, _unpack_arm64_python)


@dataclass(frozen=True)
class Emulator:
    """qemu-aarch64-static: the system's, or Debian's package unpacked in the cache."""

    @property
    def folder(self) -> Path:
        """Where the package is unpacked when the system has none."""
        return cache_folder() / "debian" / f"qemu-{_EDITION}"

    def path(self) -> str | None:
        """Where it is, or None."""
        cached = self.folder / "usr" / "bin" / _EMULATOR
        return shutil.which(_EMULATOR) or (str(cached) if cached.is_file() else None)

    def missing(self) -> str | None:
        """See `Requirement`."""
        return None if self.path() else f"the program {_EMULATOR} is not installed"

    def command(self) -> str | None:
        """See `Requirement`."""
        return None

    def install(self, log: Log) -> None:
        """Download and unpack the package."""
        log("downloading qemu-user-static from Debian")
        fill(self.folder, _unpack_emulator)


def _unpack_arm64_python(folder: Path) -> None:
    state = folder / ".apt"
    for part in ("lists/partial", "cache/archives/partial"):
        (state / part).mkdir(parents=True)
    (state / "status").touch()
    # An empty list of installed packages: so the download holds everything that they depend on.
    settings = {
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "Dir::State::lists": str(state / "lists"),
        "Dir::State::status": str(state / "status"),
        "Dir::Cache": str(state / "cache"),
        "APT::Sandbox::User": "",
        "APT::Install-Recommends": "false",
        "Debug::NoLocking": "true",
    }
    options = [part for key, value in settings.items() for part in ("-o", f"{key}={value}")]
    _require_debian()
    run_tool(["apt-get", *options, "update"], "apt-get")
    run_tool(["apt-get", *options, "-y", "--download-only", "install", *_PACKAGES], "apt-get")
    _unpack(state / "cache" / "archives", folder)
    shutil.rmtree(state)


def _unpack_emulator(folder: Path) -> None:
    _require_debian()
    archives = folder / ".archives"
    archives.mkdir()
    output = run_tool(["apt-get", "download", "--print-uris", "qemu-user-static"], "apt-get")
    if not output.strip():
        raise UserError("apt-get knows no package qemu-user-static; run `apt-get update` first")
    run_tool(
        ["sh", "-c", 'cd "$1" && apt-get -o APT::Sandbox::User= download qemu-user-static', "sh", str(archives)],
        "apt-get",
    )
    _unpack(archives, folder)
    shutil.rmtree(archives)


def _unpack(archives: Path, folder: Path) -> None:
    found = sorted(archives.glob("*.deb"))
    if not found:
        raise UserError("apt-get downloaded no package; check the network and try again")
    for archive in found:
        run_tool(["dpkg-deb", "-x", str(archive), str(folder)], "dpkg-deb")


def _require_debian() -> None:
    absent = [name for name in ("apt-get", "dpkg-deb") if shutil.which(name) is None]
    if absent:
        raise UserError(
            f"{' and '.join(absent)} are not on this system; on Debian or Ubuntu the emulated arm64 can be set up"
        )
