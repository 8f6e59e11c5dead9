"""Which device profiles are ready here: what `signround-edge devices` lists."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from devices import DeviceProfile, load_devices
from runtime_tests.setup.devices import missing, way_out
from runtime_tests.transports.lookup import transport_to
from signround_edge.plugins import runtimes as runtimes_by_name


@dataclass(frozen=True)
class DeviceStatus:
    """One profile, seen from this machine.

    Attributes:
        profile: the profile.
        reason: why nothing can run on it here, or None.
        runtimes: its runtimes by name, each with why it cannot run, or None.
        command: the shell command that makes it ready, where one does.
    """

    profile: DeviceProfile
    reason: str | None
    runtimes: dict[str, str | None]
    command: str | None = None

    @property
    def ready(self) -> bool:
        """Whether at least one runtime can run."""
        return self.reason is None and None in self.runtimes.values()

    @property
    def why_not(self) -> str | None:
        """The first reason why it is not ready, or None."""
        if self.ready:
            return None
        return self.reason or next((r for r in self.runtimes.values() if r), "it names no runtime")

    def to_json(self) -> dict[str, Any]:
        """The entry of `devices --json`."""
        runtimes = [{"name": name, "ready": reason is None, "reason": reason} for name, reason in self.runtimes.items()]
        return {
            "name": self.profile.name,
            "description": self.profile.description,
            "transport": self.profile.transport,
            "ready": self.ready,
            "reason": self.reason,
            "command": self.command,
            "memory_budget_mb": self.profile.memory_budget_mb,
            "runtimes": runtimes,
        }


def status_of(profile: DeviceProfile) -> DeviceStatus:
    """One profile, seen from this machine."""
    known, transport = runtimes_by_name(), transport_to(profile)
    away = profile.unavailable() or transport.unavailable()  # asked once: it may knock at another machine's door
    reasons: dict[str, str | None] = {}
    for name in profile.runtimes:
        if name not in known:
            reasons[name] = "no such runtime is installed"
        else:
            reasons[name] = away or known[name].on(profile, transport).unavailable()
    absent = missing(profile)
    reason = profile.unavailable() or (absent[0] if absent and None not in reasons.values() else None)
    return DeviceStatus(profile, reason, reasons, way_out(profile))


def list_devices() -> list[DeviceStatus]:
    """Every shipped profile, in alphabetical order."""
    return [status_of(profile) for profile in load_devices().values()]
