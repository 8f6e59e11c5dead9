"""Workers in Node: onnxruntime-web (wasm) and onnxruntime-node (native)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from runtime_tests import javascript
from runtime_tests.setup.npm import NODE, ONNXRUNTIME_NODE, ONNXRUNTIME_WEB
from runtime_tests.transports.interface import DEFAULT_TIMEOUT
from runtime_tests.transports.leash import Leash
from runtime_tests.transports.process import ProcessWorker

_PACKAGES = (ONNXRUNTIME_WEB, ONNXRUNTIME_NODE)


class LeashedWorker(ProcessWorker):
    """A worker process of a program that would not notice that we are gone; see `leash`.

    Args:
        subject, command, timeout, environment: as in `ProcessWorker`.
    """

    def __init__(self, subject: str, command: Sequence[str], timeout: float) -> None:
        self._leash = Leash()
        with self._leash.around(command) as (held, inherited):
            super().__init__(subject, held, timeout, pass_fds=inherited)

    def close(self) -> None:
        """End it, and what it started."""
        self._leash.let_go()
        super().close()

    def _kill_hung(self) -> None:
        self._hung = True
        self._leash.let_go()


@dataclass(frozen=True)
class NodeTransport:
    """Node on this machine."""

    def unavailable(self) -> str | None:
        """Why no worker can be had."""
        return NODE.missing()

    def start(self, subject: str, timeout: float = DEFAULT_TIMEOUT) -> LeashedWorker:
        """See `Transport`."""
        script = Path(javascript.__file__).parent / "node_worker.mjs"
        packages = [f"{package.name}={package.path}" for package in _PACKAGES if package.missing() is None]
        return LeashedWorker(subject, [NODE.path() or "node", str(script), *packages], timeout)

    def close(self) -> None:
        """Nothing is shared between workers."""
