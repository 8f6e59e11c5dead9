"""Workers in a page: headless Chromium on this computer, or whatever browser a person opens on a phone.

One connection (`PageServer`) serves one page at a time, and the page serves any number of workers: every request names
its session. A page that is loaded again has lost what was open, so its workers fail as lost connections and are made
anew.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from devices import DeviceProfile
from runtime_tests.setup.devices import CHROMIUM
from runtime_tests.transports.interface import DEFAULT_TIMEOUT, Closing, ConnectionLost, Transport, WorkerFailure
from runtime_tests.transports.leash import Leash
from runtime_tests.transports.pages.server import PageGone, PageServer
from runtime_tests.transports.push import files_of
from runtime_tests.worker.protocol import Message
from signround_edge.errors import UserError, last_lines

_FLAGS = (
    "--headless",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--mute-audio",
)
_NO_GPU = ("--disable-gpu",)
# An adapter of the graphics card; where there is none Chromium gives SwiftShader's, which computes on the CPU.
_WEBGPU = ("--enable-unsafe-webgpu", "--enable-features=Vulkan")
_START_SECONDS = 120.0


class PageWorker(Closing):
    """A session in the page that a server serves.

    Args:
        subject, timeout: as in `Transport.start`.
        server: where the page is, or will be; `wait_for_page` has returned.
        on_close: called once at the end.
    """

    def __init__(
        self,
        subject: str,
        server: PageServer,
        timeout: float,
        on_close: Callable[[], None] = lambda: None,
        last_lines: Callable[[], str] = lambda: "",
    ) -> None:
        self._subject, self._server, self._timeout = subject, server, timeout
        self._on_close, self._last_lines = on_close, last_lines
        self._page = server.page
        self._session = server.new_session()
        self._closed = False

    def push(self, artifact: Path) -> str:
        """Offer the artifact's files to the page, by hash; the address under which it finds them."""
        return self._server.offer(files_of(artifact))

    def call(self, op: str, arrays: dict[str, NDArray[Any]] | None = None, **header: Any) -> Message:
        """Send one request and wait for its reply; errors as in `Worker`."""
        request = Message({"op": op, "session": self._session, **header}, arrays or {})
        try:
            reply = self._server.ask(request, self._page, self._timeout)
        except PageGone as error:
            lines = self._last_lines()
            self.close()
            kind = ConnectionLost if error.may_come_back else WorkerFailure
            raise kind(f"{self._subject}: {error}{f'; its last lines: {lines}' if lines else ''}") from error
        if "failure" in reply.header:
            self.close()
            raise WorkerFailure(
                f"{self._subject}: the runtime failed in {op!r}; its last lines: {reply.header['failure']}"
            )
        if "error" in reply.header:
            raise UserError(f"{self._subject}: {reply.header['error']}")
        return reply

    def close(self) -> None:
        """Let the page free the session. May be repeated."""
        if not self._closed:
            self._closed = True
            self._server.tell(Message({"op": "close", "session": self._session}), self._page)
            self._on_close()


class ChromiumTransport:
    """Headless Chromium on this computer; every worker has a browser of its own.

    Args:
        gpu: pages may use WebGPU.
    """

    def __init__(self, gpu: bool = False) -> None:
        self._gpu = gpu

    def unavailable(self) -> str | None:
        """Why no worker can be had."""
        return CHROMIUM.missing_with_way_out()

    def start(self, subject: str, timeout: float = DEFAULT_TIMEOUT) -> PageWorker:
        """See `Transport`."""
        server = PageServer("127.0.0.1")
        try:
            browser = Chromium(server.url, on_exit=server.lose_page, gpu=self._gpu)
        except BaseException:
            server.close()
            raise

        def end() -> None:
            server.close()
            browser.close()

        try:
            server.wait_for_page(_START_SECONDS)
        except PageGone as error:
            lines = browser.last_lines()
            end()
            raise WorkerFailure(f"{subject}: Chromium did not open the page; its last lines: {lines}") from error
        except BaseException:
            end()
            raise
        return PageWorker(subject, server, timeout, end, browser.last_lines)

    def close(self) -> None:
        """Nothing is shared between workers."""


class Chromium:
    """A headless browser on one page, with a profile folder of its own; gone with us, however we end.

    Args:
        url: the page.
        on_exit: called, in another thread, with why it ended when it ends before `close`.
        flags: more flags of Chromium.
        gpu: the page may use WebGPU.
    """

    def __init__(
        self,
        url: str,
        on_exit: Callable[[str], None] = lambda _why: None,
        flags: tuple[str, ...] = (),
        gpu: bool = False,
    ) -> None:
        profile = tempfile.mkdtemp(prefix="signround-chromium-")
        root = ("--no-sandbox",) if hasattr(os, "geteuid") and os.geteuid() == 0 else ()
        flags = (*_FLAGS, *(_WEBGPU if gpu else _NO_GPU), *root, *flags)
        browser = [CHROMIUM.path() or "chromium", *flags, f"--user-data-dir={profile}", url]
        self._leash = Leash(profile)
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  closed in close()
        with self._leash.around(browser) as (held, inherited):
            self._process = subprocess.Popen(
                held, stdin=subprocess.DEVNULL, stdout=self._stderr, stderr=self._stderr, pass_fds=inherited
            )
        self._closing = False
        threading.Thread(target=self._watch, args=(on_exit,), daemon=True).start()

    @property
    def pid(self) -> int:
        """Process id of the leash; the browser is its child."""
        return self._process.pid

    def last_lines(self) -> str:
        """What it said last."""
        if self._stderr.closed:
            return ""
        self._stderr.seek(0)
        return last_lines(self._stderr.read().decode(errors="replace"))

    def close(self) -> None:
        """End it and remove its profile folder. May be repeated."""
        if not self._closing:
            self._closing = True
            self._leash.let_go()
            self._process.wait()
            self._stderr.close()

    def _watch(self, on_exit: Callable[[str], None]) -> None:
        self._process.wait()
        if not self._closing:
            on_exit("the browser ended")


class PhoneTransport:
    """A browser that a person opens: all workers share one page at one address, which says itself once.

    Args:
        profile: its `address` is where to listen, host or host:port; this computer's own by default.
        say: shows a line to the person.
    """

    def __init__(self, profile: DeviceProfile, say: Callable[[str], None] | None = None) -> None:
        self._profile = profile
        self._say = say or (lambda line: print(line, file=sys.stderr, flush=True))
        self._server: PageServer | None = None

    def unavailable(self) -> str | None:
        """Nothing is known before somebody opens the page."""
        return None

    def start(self, subject: str, timeout: float = DEFAULT_TIMEOUT) -> PageWorker:
        """See `Transport`: the first worker waits until somebody opens the page."""
        if self._server is None:
            self._server = self._listen()
        try:
            self._server.wait_for_page(timeout)
        except PageGone as error:
            raise WorkerFailure(f"{subject}: nobody opened the page within {timeout:g} s") from error
        return PageWorker(subject, self._server, timeout)

    def close(self) -> None:
        """Tell the page that it is over, and stop listening."""
        if self._server is not None:
            self._server.say_goodbye()
            self._server.close()
            self._server = None

    def _listen(self) -> PageServer:
        from runtime_tests.transports.pages.phone import invitation, listening_address

        host, port = listening_address(self._profile.address)
        server = PageServer(host, port)
        for line in invitation(server.url, server.port):
            self._say(line)
        return server


def browser_transport(profile: DeviceProfile) -> Transport:
    """The transport of a profile."""
    return PhoneTransport(profile) if profile.transport == "phone-browser" else ChromiumTransport(profile.gpu)
