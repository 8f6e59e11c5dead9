"""A page in headless Chromium at phone size, driven through playwright-core."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from runtime_tests.setup.devices import CHROMIUM
from runtime_tests.setup.npm import NODE, NpmPackage
from signround_edge.errors import UserError

PLAYWRIGHT = NpmPackage("playwright-core", "1.65.1")
WIDTH, HEIGHT = 390, 844


class Phone:
    """One browser; `open` closes the page before."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def call(self, call: str, **values: Any) -> Any:
        """A call of phone.mjs; AssertionError with what playwright says when it fails."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"call": call, **values}) + "\n")
        self._process.stdin.flush()
        reply = json.loads(self._process.stdout.readline())
        assert "error" not in reply, reply["error"]
        return reply["value"]

    def open(self, url: str, width: int = WIDTH, height: int = HEIGHT, dark: bool = False, before: str = "") -> None:
        """Load a page in a new profile; `before` is JavaScript that runs in it first."""
        self.call("open", url=url, width=width, height=height, dark=dark, before=before)

    def tap(self, label: str) -> None:
        """Tap the button of that name."""
        self.call("tap", label=label)

    def type(self, label: str, text: str) -> None:
        """Type into the field of that name, once it takes text."""
        self.call("type", label=label, text=text)

    def wait(self, condition: str, seconds: float = 180) -> None:
        """Until a JavaScript expression is true; AssertionError when that takes too long.

        (playwright's own waitForFunction needs eval, which the page's Content-Security-Policy forbids.)
        """
        until = time.monotonic() + seconds
        while not self.evaluate(condition):
            assert time.monotonic() < until, f"{condition} is not true after {seconds:g} s"
            time.sleep(0.1)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        return self.call("evaluate", expression=expression)

    def screenshot(self, path: Path) -> None:
        """A picture of what is visible."""
        self.call("screenshot", path=str(path))

    def requests(self) -> list[str]:
        """Every address that the page and its workers asked for."""
        addresses: list[str] = self.call("requests")
        return addresses


@contextmanager
def phone(*flags: str) -> Iterator[Phone]:
    """A browser with these flags of Chromium, or a visible skip."""
    for program in (NODE, CHROMIUM):
        if program.missing():
            pytest.skip(f"{program.missing()} (apt-get install -y {program.package})")
    try:
        if PLAYWRIGHT.missing():
            PLAYWRIGHT.install(lambda _line: None)
    except UserError as error:
        pytest.skip(f"{PLAYWRIGHT.missing()}, and it could not be installed: {error}")
    driver = [str(NODE.path()), str(Path(__file__).with_suffix(".mjs")), str(PLAYWRIGHT.path), str(CHROMIUM.path())]
    process = subprocess.Popen([*driver, *flags], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield Phone(process)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(timeout=60)
