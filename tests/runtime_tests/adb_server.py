"""An adb server with one phone that is this machine, for the real `adb` client: its wire protocol on a port of its own.

A request is four hexadecimal digits of length and a text; answers begin with OKAY or FAIL (system/core/adb,
OVERVIEW.TXT and SERVICES.TXT). What is understood: host:version, host:devices, host:kill, host:features, transport,
reverse:forward, reverse:killforward and shell.
"""

from __future__ import annotations

import socket
import socketserver
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

_VERSION = 41  # ADB_SERVER_VERSION: a client that finds another one replaces the server


@dataclass
class Phone:
    """What the server pretends to have.

    Attributes:
        serial, state: as `adb devices` shows them.
        shell: runs a command on the "phone" and returns its output.
        reversed: forwarded ports, the phone's → this machine's.
        requests: every request that came.
    """

    serial: str = "FAKE123"
    state: str = "device"
    shell: Callable[[str], str] = lambda command: ""
    reversed: dict[str, str] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)


class AdbServer:
    """Use as a context manager; `port` is where it listens."""

    def __init__(self, *phones: Phone) -> None:
        self.phones = phones
        self.killed = False
        self._server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> AdbServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, connection: socket.socket) -> None:
        """One connection: services until one of them uses it up."""
        phone: Phone | None = None
        while (service := _read(connection)) is not None:
            for known in self.phones:
                known.requests.append(service)
            chosen = next((p for p in self.phones if p.serial in service), None)
            if service == "host:version":
                return _say(connection, f"{_VERSION:04x}")
            if service == "host:devices":
                return _say(connection, "".join(f"{p.serial}\t{p.state}\n" for p in self.phones))
            if service == "host:kill":
                self.killed = True
                return connection.sendall(b"OKAY")
            if service.endswith("features"):
                return _say(connection, "")
            if service.startswith(("host:transport", "host:tport")):
                phone = chosen or (self.phones[0] if "any" in service else None)
                if phone is None:
                    return _fail(connection, "device not found")
                connection.sendall(b"OKAY" + (bytes(8) if service.startswith("host:tport") else b""))
            elif phone is not None and service.startswith("reverse:forward:"):
                there, _, here = service.removeprefix("reverse:forward:").partition(";")
                phone.reversed[there] = here
                return connection.sendall(b"OKAYOKAY")
            elif phone is not None and service.startswith("reverse:killforward:"):
                phone.reversed.pop(service.removeprefix("reverse:killforward:"))
                return connection.sendall(b"OKAYOKAY")
            elif phone is not None and service.startswith("shell"):
                connection.sendall(b"OKAY")
                return connection.sendall(phone.shell(service.partition(":")[2]).encode())
            else:
                return _fail(connection, f"unknown service {service}")


def _handler(server: AdbServer) -> type[socketserver.BaseRequestHandler]:
    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            server.answer(self.request)

    return Handler


def _read(connection: socket.socket) -> str | None:
    start = _exactly(connection, 4)
    return None if start is None else (_exactly(connection, int(start, 16)) or b"").decode()


def _exactly(connection: socket.socket, count: int) -> bytes | None:
    data = b""
    while len(data) < count:
        part = connection.recv(count - len(data))
        if not part:
            return None
        data += part
    return data


def _say(connection: socket.socket, text: str) -> None:
    connection.sendall(b"OKAY" + f"{len(text):04x}{text}".encode())


def _fail(connection: socket.socket, text: str) -> None:
    connection.sendall(b"FAIL" + f"{len(text):04x}{text}".encode())
