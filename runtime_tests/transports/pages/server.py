"""The server behind a page that is a worker: it hands requests to the page and takes its replies.

It also knows which files the page may have. Nothing is kept on disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import re
import secrets
import threading
from pathlib import Path

from runtime_tests import javascript
from runtime_tests.setup.npm import ONNXRUNTIME_WEB, WLLAMA
from runtime_tests.transports.pages.http_server import TYPES, HttpServer
from runtime_tests.worker.protocol import Message, send
from signround_edge.files import sha256_of

_POLL_SECONDS = 15.0
_PACKAGES = {"onnxruntime-web": ONNXRUNTIME_WEB, "wllama": WLLAMA}


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
        self._server = HttpServer((host, port), self)
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
            return file if file.is_relative_to(root) and file.suffix in TYPES else None
        return None
