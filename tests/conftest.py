"""Shared fixtures: paths of the shipped tiny model, and small random models of each architecture."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

# Two workers on two cores: one thread each is faster than threads that wait for one another, and results do not vary.
torch.set_num_threads(1)

# adb starts a server where none runs, and ends it again: each worker has its own, and none is the developer's.
with socket.socket() as _free:
    _free.bind(("127.0.0.1", 0))
    os.environ["ANDROID_ADB_SERVER_PORT"] = str(_free.getsockname()[1])


@pytest.fixture(scope="session")
def tiny_llama() -> Path:
    """The trained tiny model that is shipped as package data."""
    from signround_edge.demo import tiny_llama_path

    return tiny_llama_path()


@pytest.fixture(scope="session")
def calibration_text() -> Path:
    """The shipped calibration text."""
    from signround_edge.demo import calibration_text_path

    return calibration_text_path()


@pytest.fixture(scope="session")
def evaluation_text() -> Path:
    """The shipped evaluation text."""
    from signround_edge.demo import evaluation_text_path

    return evaluation_text_path()
