"""What tests of JavaScript runtimes need, or a visible skip."""

from __future__ import annotations

import pytest

from devices import DeviceProfile, get_device
from runtime_tests.setup.devices import requirements
from signround_edge.errors import UserError


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
