"""How a person gets a phone to open the page: its address and a QR code in the terminal."""

from __future__ import annotations

import io
import socket

from signround_edge.errors import UserError

_LOOPBACK = "127.0.0.1"


def listening_address(address: str | None) -> tuple[str, int]:
    """(host, port) to listen on: what is asked for as host or host:port, or this computer's address in its network.

    Raises:
        UserError: the port is no number.
    """
    if not address:
        return own_address(), 0
    host, colon, port = address.rpartition(":")
    if not colon:
        return address, 0
    if not port.isdigit() or int(port) > 65535:
        raise UserError(f"{address} is not HOST or HOST:PORT to listen on")
    return host, int(port)


def own_address() -> str:
    """The address of this computer that others in its network see; the loopback one without a network."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # a datagram socket only chooses a route, nothing is sent
            host: str = probe.getsockname()[0]
        except OSError:
            return _LOOPBACK
    return host


def invitation(url: str, port: int) -> list[str]:
    """Lines for the terminal: what to do, the address and its QR code."""
    lines = ["Open this page on the phone (same Wi-Fi), and keep its screen on until it says that it is done:", url]
    if url.startswith(f"http://{_LOOPBACK}"):
        lines[0] = "Open this page in the phone's browser, with this port forwarded to it, and keep its screen on:"
        lines.append(f"(over USB: adb reverse tcp:{port} tcp:{port})")
    return [*lines, qr_code(url)]


def qr_code(text: str) -> str:
    """A QR code in half blocks, for a terminal with a dark or a light background."""
    import segno

    out = io.StringIO()
    segno.make(text, error="l", micro=False).terminal(out=out, border=2, compact=True)
    return out.getvalue()
