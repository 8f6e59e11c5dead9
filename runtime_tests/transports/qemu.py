"""Workers in an emulated arm64 Linux: qemu's user mode, an unpacked arm64 Python, arm64 wheels.

The emulated process sees this machine's files, so nothing is pushed. Figures are those of the arm64 kernels; the time
that they take says nothing about a device.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from devices import DeviceProfile
from runtime_tests.setup.arm64_python import Arm64Python, Emulator
from runtime_tests.setup.arm_cpuinfo import emulated_root
from runtime_tests.setup.wheels import WorkerPackages
from runtime_tests.setup.worker_bundle import worker_bundle
from runtime_tests.transports.interface import DEFAULT_TIMEOUT
from runtime_tests.transports.local import QUIET_ENVIRONMENT
from runtime_tests.transports.process import ProcessWorker

MACHINE = "aarch64"
DEFAULT_CPU = "max"


@dataclass(frozen=True)
class QemuTransport:
    """An emulated core.

    Attributes:
        profile: its `cpu` is one of `qemu-aarch64-static -cpu help`.
    """

    profile: DeviceProfile

    def unavailable(self) -> str | None:
        """Why no worker can be had."""
        python = Arm64Python()
        missing = Emulator().missing() or python.missing() or WorkerPackages(MACHINE, python.version).missing()
        return f"{missing} (signround-edge devices --setup {self.profile.name})" if missing else None

    def start(self, subject: str, timeout: float = DEFAULT_TIMEOUT) -> ProcessWorker:
        """See `Transport`."""
        python, cpu = Arm64Python(), self.profile.cpu or DEFAULT_CPU
        root = emulated_root(python, cpu)
        path = os.pathsep.join(map(str, (WorkerPackages(MACHINE, python.version).folder, worker_bundle())))
        command = [Emulator().path() or "qemu-aarch64-static", "-L", str(root), "-cpu", cpu]
        # -S -P: neither this system's packages nor the current folder belong to the worker
        command += [str(python.interpreter), "-S", "-P", "-m", "runtime_tests.worker"]
        environment = {**_clean(), **QUIET_ENVIRONMENT, "PYTHONPATH": path}
        return ProcessWorker(subject, command, timeout, environment)

    def close(self) -> None:
        """Nothing is shared between workers."""


def _clean() -> dict[str, str]:
    """This process's environment without what would lead an arm64 Python to x86 libraries."""
    return {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "LD_"))}
