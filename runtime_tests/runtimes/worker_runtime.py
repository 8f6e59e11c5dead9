"""What runtimes have in common whose sessions live in a worker, on this machine or on a device."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

from devices import DeviceProfile
from runtime_tests.transports.interface import DEFAULT_TIMEOUT, Transport
from runtime_tests.transports.local import LocalTransport
from runtime_tests.transports.reconnecting import ReconnectingWorker


@dataclass(frozen=True)
class WorkerRuntime:
    """A runtime behind a transport.

    Attributes:
        timeout: seconds a request may take before the worker counts as hung.
        transport: the way to the machine; this one by default.
        digest: whether sessions bring digests back, not all logits.
    """

    timeout: float = DEFAULT_TIMEOUT
    transport: Transport = field(default_factory=LocalTransport)
    digest: bool = False

    def on(self, profile: DeviceProfile, transport: Transport) -> Self:
        """The same runtime on a device."""
        digest = profile.logits == "digest"
        return replace(self, timeout=profile.timeout_s, transport=transport, digest=digest)

    def worker(self, artifact: Path) -> ReconnectingWorker:
        """A worker without a session, for requests about an artifact that need nothing of the ones before them."""
        subject = str(artifact)
        return ReconnectingWorker(subject, lambda: self.transport.start(subject, self.timeout))
