"""The HTTP server behind a page that is a worker: serves the page, artifacts and packages, hands requests to the page
and takes its replies.

Every address begins with a random token. The first browser that opens the page gets a cookie; whoever comes later
without it is turned away, so that a link that was seen by others is of no use. Nothing is kept on disk.

    GET  /TOKEN/                   the page
    GET  /TOKEN/js/NAME            our modules
    GET  /TOKEN/packages/P/FILE    files of the npm packages
    GET  /TOKEN/files/KEY/NAME     an artifact's file; Range is understood, so a broken download goes on
    GET  /TOKEN/next?page=P        the next request (a frame), or 204 after some seconds without one
    POST /TOKEN/reply?page=P&n=N   the reply to request N (a frame)
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import mimetypes
import re
import secrets
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from runtime_tests import javascript
from runtime_tests.setup.npm import ONNXRUNTIME_WEB, WLLAMA
from runtime_tests.worker.protocol import Message, ProtocolError, receive, send
from signround_edge.files import sha256_of

_POLL_SECONDS = 15.0
_CHUNK = 1 << 18
_MAX_REPLY = 4 << 30
_COOKIE = "signround"
_PACKAGES = {"onnxruntime-web": ONNXRUNTIME_WEB, "wllama": WLLAMA}
_TYPES = {".mjs": "text/javascript", ".js": "text/javascript", ".wasm": "application/wasm"}
# The first three isolate the page, so that browsers give it precise clocks and shared memory.
_HEADERS = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class PageGone(Exception):
    """The page is not there, or not any more.

    Attributes:
        may_come_back: it was loaded again, so another try makes sense.
    """

    def __init__(self, message: str, may_come_back: bool) -> None:
        super().__init__(message)
        self.may_come_back = may_come_back


class PageServer:
    """A server for one page.

    Args:
        host: where to listen.
        port: 0: any free one.

    Attributes:
        page: the name that the page gave itself when it was loaded; another one means that it was loaded again.
    """

    def __init__(self, host: str, port: int = 0) -> None:
        self.token = secrets.token_urlsafe(16)
        self.cookie = secrets.token_urlsafe(16)
        self.cookie_given = False
        self.page: str | None = None
        self._lost: str | None = None
        self._changed = threading.Condition()
        self._requests: list[tuple[int, bytes]] = []  # not yet acknowledged by a reply, oldest first
        self._replies: dict[int, Message] = {}
        self._awaited: set[int] = set()
        self._number = 0
        self._sessions = 0
        self._offers: dict[str, dict[str, Path]] = {}
        self._server = _Server((host, port), self)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        """The port that it listens on."""
        return int(self._server.server_address[1])

    @property
    def url(self) -> str:
        """The page's address."""
        return f"http://{self._server.server_address[0]!s}:{self.port}/{self.token}/"

    def new_session(self) -> int:
        """A number that no session had before."""
        self._sessions += 1
        return self._sessions

    def offer(self, files: list[Path]) -> str:
        """Serve files to the page; the address of their folder, which changes with their contents."""
        key = hashlib.sha256("".join(sha256_of(file) for file in files).encode()).hexdigest()
        self._offers[key] = {file.name: file for file in files}
        return f"files/{key}/"

    def wait_for_page(self, timeout: float) -> None:
        """Until the page has been opened. PageGone when that does not happen in time."""
        with self._changed:
            if not self._changed.wait_for(lambda: self.page is not None or self._lost is not None, timeout):
                raise PageGone("nobody opened the page", False)
            if self._lost is not None:
                raise PageGone(self._lost, False)

    def ask(self, request: Message, page: str | None, timeout: float) -> Message:
        """Give the page a request and wait for its reply.

        Raises:
            PageGone: it was loaded again, its browser ended, or there was no reply within `timeout` seconds.
        """
        with self._changed:
            number = self._queue(request, page)
            self._awaited.add(number)

            def settled() -> bool:
                return number in self._replies or self._lost is not None or self.page != page

            in_time = self._changed.wait_for(settled, timeout)
            self._requests = [entry for entry in self._requests if entry[0] != number]
            self._awaited.discard(number)
            if number in self._replies:
                return self._replies.pop(number)
            if self._lost is not None:
                raise PageGone(self._lost, False)
            if not in_time:
                raise PageGone(f"gave no answer to {request.header['op']!r} within {timeout:g} s", False)
            raise PageGone("the page was loaded again", True)

    def tell(self, request: Message, page: str | None) -> None:
        """Give the page a request whose reply nobody waits for."""
        with contextlib.suppress(PageGone), self._changed:
            self._queue(request, page)

    def say_goodbye(self) -> None:
        """Let the page say that it is over, if it is there."""
        with contextlib.suppress(PageGone):
            self.ask(Message({"op": "done", "session": 0}), self.page, 5.0)

    def lose_page(self, why: str) -> None:
        """The browser is gone for good."""
        with self._changed:
            self._lost = why
            self._changed.notify_all()

    def close(self) -> None:
        """Stop listening. May be repeated."""
        self.lose_page("it is over")
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _queue(self, request: Message, page: str | None) -> int:
        if self._lost is not None:
            raise PageGone(self._lost, False)
        if page is None or self.page != page:
            raise PageGone("the page was loaded again", True)
        self._number += 1
        buffer = io.BytesIO()
        send(buffer, Message({**request.header, "n": self._number}, request.arrays))
        self._requests.append((self._number, buffer.getvalue()))
        self._changed.notify_all()
        return self._number

    def next_request(self, page: str, after: int) -> bytes | None:
        """The oldest unanswered request behind number `after`; None after some seconds without one."""
        with self._changed:
            if page != self.page:
                self.page = page
                self._requests.clear()
                self._changed.notify_all()

            def waiting() -> bool:
                return self._lost is not None or page != self.page or any(n > after for n, _ in self._requests)

            self._changed.wait_for(waiting, _POLL_SECONDS)
            if self._lost is not None or page != self.page:
                return None
            return next((frame for n, frame in self._requests if n > after), None)

    def take_reply(self, page: str, number: int, reply: Message) -> None:
        """A reply that came; one that nobody waits for any more is dropped."""
        with self._changed:
            if page != self.page:
                return
            self._requests = [entry for entry in self._requests if entry[0] != number]
            if number in self._awaited:
                self._replies[number] = reply
                self._changed.notify_all()

    def find(self, path: str) -> Path | None:
        """The file behind an address below the token, or None."""
        kind, _, rest = path.partition("/")
        if kind == "":
            return Path(javascript.__file__).parent / "page.html"
        if kind == "js" and re.fullmatch(r"[a-z_]+\.(mjs|css)", rest):
            return Path(javascript.__file__).parent / rest
        name, _, inside = rest.partition("/")
        if kind == "files":
            return self._offers.get(name, {}).get(inside)
        if kind == "packages" and name in _PACKAGES:
            root = _PACKAGES[name].path.resolve()
            file = (root / inside).resolve()
            return file if file.is_relative_to(root) and file.suffix in _TYPES else None
        return None


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], pages: PageServer) -> None:
        self.pages = pages
        super().__init__(address, _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes away in the middle is no error of ours."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 120
    server: _Server
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
        kind = _TYPES.get(file.suffix) or mimetypes.guess_type(file.name)[0] or "application/octet-stream"
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
