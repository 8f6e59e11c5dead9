"""Workers in Node: onnxruntime-web (wasm) and onnxruntime-node (native)."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from runtime_tests import javascript
from runtime_tests.setup.npm import NODE, ONNXRUNTIME_NODE, ONNXRUNTIME_WEB
from runtime_tests.transports import leash
from runtime_tests.transports.interface import DEFAULT_TIMEOUT
from runtime_tests.transports.process import ProcessWorker

_PACKAGES = (ONNXRUNTIME_WEB, ONNXRUNTIME_NODE)


class LeashedWorker(ProcessWorker):
    """A worker process of a program that would not notice that we are gone; see `leash`.

    Args:
        subject, command, timeout, environment: as in `ProcessWorker`.
    """

    def __init__(self, subject: str, command: Sequence[str], timeout: float) -> None:
        read, write = os.pipe()
        self._lifeline: int | None = write
        try:
            held = [sys.executable, "-P", leash.__file__, str(read), "-", *command]
            super().__init__(subject, held, timeout, pass_fds=(read,))
        except BaseException:
            self._let_go()
            raise
        finally:
            os.close(read)

    def close(self) -> None:
        """End it, and what it started."""
        self._let_go()
        super().close()

    def _kill_hung(self) -> None:
        self._hung = True
        self._let_go()

    def _let_go(self) -> None:
        lifeline, self._lifeline = self._lifeline, None
        if lifeline is not None:
            os.close(lifeline)


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
