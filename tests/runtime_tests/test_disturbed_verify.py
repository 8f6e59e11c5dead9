"""`verify` killed, or robbed of its files or disk: a right verdict or none, and nothing is left running or on disk."""

from __future__ import annotations

import random
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from runtime_tests.temporary import PREFIX, temporary_folder
from tests.runtime_tests.disturbance import (
    KINDS,
    OVER_SSH,
    Place,
    Sound,
    disturb,
    kinds_here,
    tiny_llama_place,
    undisturbed,
)
from tests.runtime_tests.sshd import running_sshd

pytestmark = pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc, which is not here")
HERE = kinds_here() if sys.platform == "linux" else []
EVERY_KIND = [(KINDS[i % len(KINDS)], i) for i in range(50)]
ALWAYS = ("kill a worker", "terminate", "kill", "change the file", "disk")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return tiny_llama_place(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def sound(place: Place) -> Sound:
    return undisturbed(place)


@pytest.fixture(scope="module")
def far_place(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with running_sshd(tmp_path_factory.mktemp("sshd")) as sshd:
        yield replace(place, sshd=sshd)


@pytest.fixture(scope="module")
def far_sound(far_place: Place) -> Sound:
    return undisturbed(far_place)


@pytest.mark.parametrize(
    ("kind", "seed"),
    [pytest.param(k, s, marks=() if k in ALWAYS and s < len(KINDS) else pytest.mark.full) for k, s in EVERY_KIND],
)
def test_a_disturbed_verify_is_right_or_honest(kind: str, seed: int, request: pytest.FixtureRequest) -> None:
    if kind not in HERE:
        pytest.skip("only root can make a small file system")
    far = "far_" if kind in OVER_SSH else ""
    place, sound = request.getfixturevalue(f"{far}place"), request.getfixturevalue(f"{far}sound")
    disturb(place, sound, kind, random.Random(seed))


def test_a_folder_in_use_is_not_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    abandoned = tmp_path / f"{PREFIX}abandoned"
    abandoned.mkdir()
    (abandoned / ".lock").touch()
    with temporary_folder() as first:
        with temporary_folder() as second:
            assert first.is_dir()
            assert second.is_dir()
        assert not second.exists()
        assert not abandoned.exists()
    assert list(tmp_path.iterdir()) == []
