"""What each device profile needs on this machine: requirements by transport and runtime."""

from __future__ import annotations

from dataclasses import dataclass

from devices import DeviceProfile
from runtime_tests.setup.arm64_python import Arm64Python, Emulator
from runtime_tests.setup.npm import NODE, ONNXRUNTIME_NODE, ONNXRUNTIME_WEB, WLLAMA
from runtime_tests.setup.requirement import Log, Requirement, SystemProgram
from runtime_tests.setup.wheels import WorkerPackages
from signround_edge.errors import UserError

CHROMIUM = SystemProgram(("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"), "chromium")
SSH = SystemProgram(("ssh",), "openssh-client")
ADB = SystemProgram(("adb",), "adb")
_TRANSPORTS: dict[str, tuple[Requirement, ...]] = {
    "node": (NODE,),
    "chromium": (CHROMIUM,),
    "ssh": (SSH,),
    "adb": (ADB,),
}
_RUNTIMES: dict[str, Requirement] = {
    "onnxruntime-web": ONNXRUNTIME_WEB,
    "onnxruntime-webgpu": ONNXRUNTIME_WEB,
    "onnxruntime-node": ONNXRUNTIME_NODE,
    "wllama": WLLAMA,
}


@dataclass(frozen=True)
class _EmulatedPackages:
    """The worker's packages for the emulated Python, whose version is known once that is there."""

    def _packages(self) -> WorkerPackages:
        return WorkerPackages("aarch64", Arm64Python().version)

    def missing(self) -> str | None:
        return self._packages().missing()

    def command(self) -> str | None:
        return None

    def install(self, log: Log) -> None:
        self._packages().install(log)


def requirements(profile: DeviceProfile) -> list[Requirement]:
    """What a device needs here, in the order in which to get it."""
    if profile.transport == "qemu":
        return [Emulator(), Arm64Python(), _EmulatedPackages()]
    javascript = [_RUNTIMES[name] for name in profile.runtimes if name in _RUNTIMES]
    return list(dict.fromkeys([*_TRANSPORTS.get(profile.transport, ()), *javascript]))


def missing(profile: DeviceProfile) -> list[str]:
    """What is missing, in clauses."""
    return [reason for r in requirements(profile) if (reason := r.missing()) is not None]


def way_out(profile: DeviceProfile) -> str | None:
    """The one shell command that gets what is missing; None when nothing is."""
    needed = [r for r in requirements(profile) if r.missing() is not None]
    if not needed:
        return None
    first = list(dict.fromkeys(command for r in needed if (command := r.command()) is not None))
    return " && ".join([*first, f"signround-edge devices --setup {profile.name}"])


def set_up(profile: DeviceProfile, log: Log) -> None:
    """Get everything that a package registry serves.

    Raises:
        UserError: something cannot be had that way; the sentence names the command that a person must run.
    """
    for requirement in requirements(profile):
        if requirement.missing() is None:
            continue
        command = requirement.command()
        if command is not None:
            raise UserError(f"{profile.name}: {requirement.missing()}; run `{command}` first, then --setup again")
        requirement.install(log)
        if requirement.missing() is not None:
            raise UserError(f"{profile.name}: {requirement.missing()} although its installation ended well")
