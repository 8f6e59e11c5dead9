"""HTTP between a page that is a worker and its server: who may come in, and what each address gives.

Every address begins with a random token. The first browser that opens the page gets a cookie; whoever comes later
without it is turned away, so that a link that was seen by others is of no use.

    GET  /TOKEN/                   the page
    GET  /TOKEN/js/NAME            our modules
    GET  /TOKEN/packages/P/FILE    files of the npm packages
    GET  /TOKEN/files/KEY/NAME     an artifact's file; Range is understood, so a broken download goes on
    GET  /TOKEN/next?page=P        the next request (a frame), or 204 after some seconds without one
    POST /TOKEN/reply?page=P&n=N   the reply to request N (a frame)
"""

from __future__ import annotations

import io
import mimetypes
import re
import secrets
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import parse_qs, unquote, urlsplit

from runtime_tests.worker.protocol import Message, ProtocolError, receive

TYPES = {".mjs": "text/javascript", ".js": "text/javascript", ".wasm": "application/wasm"}
_CHUNK = 1 << 18
_MAX_REPLY = 4 << 30
_COOKIE = "signround"
# The first three isolate the page, so that browsers give it precise clocks and shared memory.
_HEADERS = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class Pages(Protocol):
    """What is served.

    Attributes:
        token: the first part of every address.
        cookie: what the one browser that may come in shows.
        cookie_given: whether a browser has it already.
    """

    token: str
    cookie: str
    cookie_given: bool

    def find(self, path: str) -> Path | None:
        """The file behind an address below the token, or None."""
        ...

    def next_request(self, page: str, after: int) -> bytes | None:
        """The oldest unanswered request behind number `after`; None after some seconds without one."""
        ...

    def take_reply(self, page: str, number: int, reply: Message) -> None:
        """A reply that came."""
        ...


class HttpServer(ThreadingHTTPServer):
    """Serves until `shutdown`.

    Args:
        address: host and port to listen on; port 0: any free one.
        pages: what it serves.
    """

    daemon_threads = True

    def __init__(self, address: tuple[str, int], pages: Pages) -> None:
        self.pages = pages
        super().__init__(address, _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes away in the middle is no error of ours."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 120
    server: HttpServer
    _give_cookie = False

    def log_message(self, format: str, *args: Any) -> None:
        """Silent."""

    def do_GET(self) -> None:
        """Pages, files and the next request."""
        split = self._enter()
        if split is None:
            return
        path, query = split
        if path == "next":
            frame = self.server.pages.next_request(query["page"], int(query.get("after", "0")))
            self._send(HTTPStatus.OK if frame else HTTPStatus.NO_CONTENT, "application/octet-stream", frame or b"")
            return
        file = self.server.pages.find(path)
        if file is None or not file.is_file():
            self._send(HTTPStatus.NOT_FOUND, "text/plain", b"not found")
        else:
            self._send_file(file)

    def do_POST(self) -> None:
        """A reply."""
        length = int(self.headers.get("Content-Length", "0"))
        split = self._enter()
        if split is None or split[0] != "reply" or length > _MAX_REPLY:
            self.close_connection = True
            if split is not None:
                self._send(HTTPStatus.NOT_FOUND, "text/plain", b"not found")
            return
        query = split[1]
        content = self.rfile.read(length)
        try:
            reply = receive(io.BytesIO(content)) if len(content) == length else None
        except ProtocolError as error:
            reply = Message({"failure": f"it answered garbage ({error})"})
        if reply is None:
            self.close_connection = True
            return
        self.server.pages.take_reply(query["page"], int(query["n"]), reply)
        self._send(HTTPStatus.NO_CONTENT, "text/plain", b"")

    def _enter(self) -> tuple[str, dict[str, str]] | None:
        """(path below the token, query) for a browser that may come in; None after turning it away."""
        pages = self.server.pages
        self._give_cookie = False
        url = urlsplit(self.path)
        _, token, *rest = unquote(url.path).split("/")
        if not secrets.compare_digest(token.encode(), pages.token.encode()):
            self._send(HTTPStatus.NOT_FOUND, "text/plain", b"not found")
            return None
        known = f"{_COOKIE}={pages.cookie}" in (self.headers.get("Cookie") or "")
        if not known and (pages.cookie_given or rest != [""]):
            text = b"This address has been opened in another browser. Run verify again for a new one."
            self._send(HTTPStatus.FORBIDDEN, "text/plain", text)
            return None
        self._give_cookie = not known
        pages.cookie_given = True
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        return "/".join(rest), query

    def _send(self, status: HTTPStatus, kind: str, content: bytes) -> None:
        self.send_response(status)
        self._headers(kind, len(content))
        if self.command != "HEAD":
            self.wfile.write(content)

    def _send_file(self, file: Path) -> None:
        size = file.stat().st_size
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        start = min(int(wanted[1]), size) if wanted else 0
        self.send_response(HTTPStatus.PARTIAL_CONTENT if wanted else HTTPStatus.OK)
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        kind = TYPES.get(file.suffix) or mimetypes.guess_type(file.name)[0] or "application/octet-stream"
        self._headers(kind, size - start)
        with open(file, "rb") as stream:
            stream.seek(start)
            while chunk := stream.read(_CHUNK):
                self.wfile.write(chunk)

    def _headers(self, kind: str, length: int) -> None:
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        if self._give_cookie:
            self.send_header("Set-Cookie", f"{_COOKIE}={self.server.pages.cookie}; Path=/; HttpOnly; SameSite=Strict")
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(length))
        self.end_headers()
