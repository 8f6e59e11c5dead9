"""Workers on another Linux machine, through the system's ssh client.

The other side needs sshd, Python 3.11 or later and nothing else: our code, the worker's packages and artifacts travel
over the same connection into `~/.cache/signround-edge` there, each under its hash and only once; an interrupted push
continues where it stopped. `remote_store` answers until the worker starts.
"""

from __future__ import annotations

import json
import shlex
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from devices import DeviceProfile
from runtime_tests.setup.devices import SSH
from runtime_tests.setup.wheels import WorkerPackages
from runtime_tests.setup.worker_bundle import worker_bundle
from runtime_tests.transports.interface import DEFAULT_TIMEOUT
from runtime_tests.transports.local import QUIET_ENVIRONMENT
from runtime_tests.transports.process import ProcessWorker
from runtime_tests.transports.push import files_of, push_file
from runtime_tests.transports.ssh_client import CONNECTION_LOST, SshClient
from runtime_tests.worker import remote_store
from runtime_tests.worker.protocol import ProtocolError
from signround_edge.errors import UserError, last_lines

_IDLE_SECONDS = "3600"  # the worker there leaves when nobody has asked for that long
_PROBE = "python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'"
_MAX_REPLY = 1 << 20


@dataclass(frozen=True)
class SshTransport:
    """Another machine.

    Attributes:
        profile: its `address` is user@host or user@host:port; a host may be a name of ~/.ssh/config.
    """

    profile: DeviceProfile

    def unavailable(self) -> str | None:
        """Why no worker can be had: no ssh, nobody answers within two seconds, no login, or no Python there."""
        missing = SSH.missing_with_way_out()
        if missing:
            return missing
        address = self.profile.address
        if not address:
            return f"it has no address (--device {self.profile.name}=user@host)"
        elsewhere = f"or give another address, --device {self.profile.name}=user@host"
        client = SshClient(address)
        if not client.answers():
            return f"nobody answers at {address} (switch it on, {elsewhere})"
        done = client.run(_PROBE)
        if done.returncode == CONNECTION_LOST:
            said = last_lines(done.stderr.decode(errors="replace"), 1) or "no reason given"
            return f"ssh cannot log in to {address}: {said} (put your key there with ssh-copy-id, {elsewhere})"
        return f"{address} has no Python 3.11 or later (install python3 there)" if done.returncode else None

    def start(self, subject: str, timeout: float = DEFAULT_TIMEOUT) -> SshWorker:
        """See `Transport`."""
        return SshWorker(subject, self.profile.address or "", timeout)

    def close(self) -> None:
        """Nothing is shared between workers."""


class SshWorker(ProcessWorker):
    """A worker behind `ssh`.

    Args:
        subject, timeout: as in `ProcessWorker`.
        address: user@host or user@host:port.
    """

    def __init__(self, subject: str, address: str, timeout: float) -> None:
        # The shell in between reports a signal as 128 + its number; ssh alone would say 255, as for a lost connection.
        source = Path(remote_store.__file__).read_text(encoding="utf-8")
        line = f"exec sh -c {shlex.quote(f'python3 -c {shlex.quote(source)}; exit $?')}"
        super().__init__(subject, SshClient(address).command(line), timeout, lost_code=CONNECTION_LOST)
        try:
            self._start_worker()
        except BaseException:
            self.close()
            raise

    def push(self, artifact: Path) -> str:
        """The artifact's path on the other machine."""
        files = files_of(artifact)
        names = {file.name: push_file(file, self._worker_has, self._give_worker) for file in files}
        folder = str(self.call("arrange", files=names).header["path"])
        return folder if artifact.is_dir() else f"{folder}/{artifact.name}"

    def _start_worker(self) -> None:
        """Bring our code and the worker's packages, and let the store become the worker."""
        facts = self._ask({"op": "hello"})
        packages = WorkerPackages(facts["machine"], facts["python"]).archive()
        bundle = worker_bundle()
        bundle_hash, packages_hash = (push_file(f, self._store_has, self._give_store) for f in (bundle, packages))
        code = self._ask({"op": "arrange", "files": {bundle.name: bundle_hash}})["path"]
        site = self._ask({"op": "unpack", "sha256": packages_hash})["path"]
        environment = {**QUIET_ENVIRONMENT, "SIGNROUND_EDGE_IDLE_SECONDS": _IDLE_SECONDS}
        self._ask({"op": "start", "path": [site, f"{code}/{bundle.name}"], "env": environment})

    def _store_has(self, sha256: str, size: int) -> int:
        return int(self._ask({"op": "have", "sha256": sha256, "bytes": size})["there"])

    def _give_store(self, sha256: str, size: int, offset: int, data: bytes) -> int:
        header = {"op": "put", "sha256": sha256, "bytes": size, "offset": offset, "size": len(data)}
        return int(self._ask(header, data)["there"])

    def _worker_has(self, sha256: str, size: int) -> int:
        return int(self.call("have", sha256=sha256, bytes=size).header["there"])

    def _give_worker(self, sha256: str, size: int, offset: int, data: bytes) -> int:
        array = {"data": np.frombuffer(data, dtype=np.uint8)}
        return int(self.call("put", array, sha256=sha256, bytes=size, offset=offset).header["there"])

    def _ask(self, header: dict[str, Any], data: bytes = b"") -> dict[str, Any]:
        """One request to the store; see `remote_store`."""
        requests, replies = self.streams
        content = json.dumps(header).encode()
        with self.watched(header["op"]):
            requests.write(struct.pack("<I", len(content)) + content + data)
            requests.flush()
            start = replies.read(4)
            length = struct.unpack("<I", start)[0] if len(start) == 4 else None
            if length is None or length > _MAX_REPLY:
                raise ProtocolError(f"expected a reply, got {start!r}")
            answer: dict[str, Any] = json.loads(replies.read(length))
        if "error" in answer:
            raise UserError(f"{self._subject}: the other machine could not {header['op']} ({answer['error']})")
        return answer
