"""An sshd of the test's own: its keys, its port on the loopback interface, its environment."""

from __future__ import annotations

import contextlib
import getpass
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.runtime_tests.processes import descendants

SSHD = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:/usr/bin")


@dataclass(frozen=True)
class Sshd:
    """A running sshd.

    Attributes:
        address: user@host:port.
        options: options of ssh that reach it.
        cache: the cache folder of the "other machine".
        pid: of the listening process.
    """

    address: str
    options: str
    cache: Path
    pid: int

    def children(self) -> list[int]:
        """Processes below it: sessions and what they run."""
        return descendants(self.pid)


@contextlib.contextmanager
def running_sshd(folder: Path) -> Iterator[Sshd]:
    """Start one in a folder; pytest.skip with the reason where there is none."""
    if SSHD is None or shutil.which("ssh") is None:
        pytest.skip("sshd or ssh is not installed (apt-get install openssh-server openssh-client)")
    for name in ("host", "client"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    port = free_port()
    cache = folder / "remote"
    shutil.copy(folder / "client.pub", folder / "authorized")
    if getpass.getuser() == "root":
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd's own, which its service would make
    python = Path(sys.executable).parent
    (folder / "sshd_config").write_text(
        f"ListenAddress 127.0.0.1\nPort {port}\nHostKey {folder / 'host'}\nAuthorizedKeysFile {folder / 'authorized'}\n"
        "StrictModes no\nUsePAM no\nPidFile none\nPasswordAuthentication no\nPermitRootLogin yes\n"
        f"SetEnv SIGNROUND_EDGE_CACHE={cache} PATH={python}:/usr/bin:/bin\n"
    )
    (folder / "ssh_config").write_text(
        f"IdentityFile {folder / 'client'}\nIdentitiesOnly yes\nStrictHostKeyChecking no\n"
        f"UserKnownHostsFile {folder / 'known'}\nLogLevel ERROR\n"
    )
    log = open(folder / "log", "wb")  # noqa: SIM115
    process = subprocess.Popen([SSHD, "-D", "-e", "-f", str(folder / "sshd_config")], stderr=log)
    try:
        deadline = time.monotonic() + 20
        while not listens(port):
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.skip(f"sshd does not start here: {(folder / 'log').read_text()[-300:]}")
            time.sleep(0.05)
        address = f"{getpass.getuser()}@127.0.0.1:{port}"
        yield Sshd(address, f"-F {folder / 'ssh_config'}", cache, process.pid)
    finally:
        process.terminate()
        process.wait()
        log.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False
