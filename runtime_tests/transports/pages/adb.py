"""An Android phone on USB, through the system's `adb` client: the phone's own browser computes.

Nothing is installed on the phone. `adb reverse` brings our page's port to the phone's localhost, which browsers trust
(so that artifacts stay in its cache), and `am start` opens the page there; the rest is the browser transport. What was
not there before is taken back at the end: the forwarded port, and adb's server where we have started it.
"""

from __future__ import annotations

from collections.abc import Callable

from devices import DeviceProfile
from runtime_tests.transports.adb_client import AdbPhone
from runtime_tests.transports.pages.browser import PhoneTransport
from runtime_tests.transports.pages.server import PageServer
from signround_edge.errors import UserError

_HOST = "127.0.0.1"


class AdbTransport(PhoneTransport):
    """A phone behind adb.

    Args:
        profile: its `address` is the phone's serial number (as `adb devices` shows it); needed with several phones.
        say: shows a line to the person.
    """

    def __init__(self, profile: DeviceProfile, say: Callable[[str], None] | None = None) -> None:
        super().__init__(profile, say)
        self._phone: AdbPhone | None = None
        self._reversed: str | None = None  # the forwarded port, as adb names it

    def unavailable(self) -> str | None:
        """Why no worker can be had: no adb, no phone, or one that has not allowed this computer."""
        try:
            AdbPhone(self._profile).close()
        except UserError as error:
            return str(error)
        return None

    def close(self) -> None:
        """Close the page, and take back what was changed."""
        super().close()
        if self._phone is None:
            return
        if self._reversed is not None:
            self._phone.call("reverse", "--remove", self._reversed, check=False)
            self._reversed = None
        self._phone.close()
        self._phone = None

    def _listen(self) -> PageServer:
        if self._phone is None:
            self._phone = AdbPhone(self._profile)
        server = PageServer(_HOST)
        try:
            port = f"tcp:{server.port}"
            self._phone.call("reverse", port, port)
            self._reversed = port
            # The address holds no character that a shell reads.
            self._phone.call("shell", f"am start -a android.intent.action.VIEW -d {server.url}")
        except UserError:
            server.close()
            raise
        self._say(f"opened a page in the browser of the phone {self._phone.address}; keep its screen on")
        return server
