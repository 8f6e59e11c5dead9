"""What tests of JavaScript runtimes need, or a visible skip; a browser as a phone has it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest

from devices import DeviceProfile, get_device
from runtime_tests.report.report import VerifyReport
from runtime_tests.setup.devices import requirements
from runtime_tests.transports.pages.browser import Chromium
from signround_edge.errors import UserError

PHONE = (
    "--window-size=412,915",
    "--user-agent=Mozilla/5.0 (Linux; Android 14; Pixel 8) Chrome/156.0 Mobile Safari/537.36",
)


def ready_device(name: str, install: bool = True) -> DeviceProfile:
    """The profile, with what package registries serve installed in the user's cache; skip where that cannot be."""
    profile = get_device(name)
    for requirement in requirements(profile):
        if requirement.missing() is None:
            continue
        if requirement.command() is not None or not install:
            pytest.skip(
                f"{requirement.missing()} ({requirement.command() or f'signround-edge devices --setup {name}'})"
            )
        try:
            requirement.install(str)
        except UserError as error:
            pytest.skip(f"{requirement.missing()}, and it could not be installed: {error}")
    return profile


@contextlib.contextmanager
def phone_browser() -> Iterator[Callable[[str], Chromium]]:
    """Opens an address in headless Chromium at phone size; every page is closed at the end."""
    with contextlib.ExitStack() as pages:
        yield lambda url: pages.enter_context(contextlib.closing(Chromium(url, flags=PHONE)))


def assert_both_pass(report: VerifyReport) -> None:
    """Both runtimes of a browser."""
    assert [(r.name, r.status, r.reason) for r in report.runtimes] == [
        ("wllama", "pass", None),
        ("onnxruntime-web", "pass", None),
    ]
