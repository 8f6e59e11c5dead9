"""Environments of their own for peers, whose requirements would not go together with ours."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def installed(folder: Path, requirements: tuple[str, ...], command: str) -> Path:
    """The bin folder of an environment; installs it once, one requirement after another.

    Args:
        requirements: torch first and alone, as a looser requirement would pull CUDA packages.
        command: installed by one of them (best the last), and where it is nothing is done.
    """
    bin_folder = folder / "bin"
    if not (bin_folder / command).exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        for requirement in requirements:
            subprocess.run([bin_folder / "python", "-m", "pip", "install", "-q", requirement], check=True)
    return bin_folder
