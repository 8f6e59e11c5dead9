"""Which transport reaches a device."""

from __future__ import annotations

from devices import DeviceProfile
from runtime_tests.transports.interface import Transport


def transport_to(profile: DeviceProfile) -> Transport:
    """The way to a device. Modules are imported on demand, as most runs need one."""
    kind = profile.transport
    if kind == "qemu":
        from runtime_tests.transports.qemu import QemuTransport

        return QemuTransport(profile)
    if kind == "ssh":
        from runtime_tests.transports.ssh import SshTransport

        return SshTransport(profile)
    if kind == "node":
        from runtime_tests.transports.node import NodeTransport

        return NodeTransport()
    if kind in ("chromium", "phone-browser"):
        from runtime_tests.transports.pages.browser import browser_transport

        return browser_transport(profile)
    if kind == "adb":
        from runtime_tests.transports.pages.adb import AdbTransport

        return AdbTransport(profile)
    from runtime_tests.transports.local import LocalTransport

    return LocalTransport()
