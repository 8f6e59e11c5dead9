"""Which device profiles are ready here: what `signround-edge devices` lists."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from devices import DeviceProfile, load_devices
from signround_edge.plugins import runtimes as runtimes_by_name


@dataclass(frozen=True)
class DeviceStatus:
    """One profile, seen from this machine.

    Attributes:
        profile: the profile.
        reason: why nothing can run on it here, or None.
        runtimes: its runtimes by name, each with why it cannot run, or None.
    """

    profile: DeviceProfile
    reason: str | None
    runtimes: dict[str, str | None]

    @property
    def ready(self) -> bool:
        """Whether at least one runtime can run."""
        return self.reason is None and None in self.runtimes.values()

    def to_json(self) -> dict[str, Any]:
        """The entry of `devices --json`."""
        runtimes = [{"name": name, "ready": reason is None, "reason": reason} for name, reason in self.runtimes.items()]
        return {
            "name": self.profile.name,
            "description": self.profile.description,
            "transport": self.profile.transport,
            "ready": self.ready,
            "reason": self.reason,
            "runtimes": runtimes,
        }


def list_devices() -> list[DeviceStatus]:
    """Every shipped profile, in alphabetical order."""
    runtimes = runtimes_by_name()
    listed = []
    for profile in load_devices().values():
        reasons = {
            name: runtimes[name].unavailable() if name in runtimes else "no such runtime is installed"
            for name in profile.runtimes
        }
        listed.append(DeviceStatus(profile, profile.unavailable(), reasons))
    return listed
