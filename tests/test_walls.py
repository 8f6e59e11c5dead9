"""The walls between the rooms hold, and each contract of `make lint` fails when one line breaks it."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("signround_edge", "exporters", "runtime_tests", "devices")
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CONTRACTS = [contract["id"] for contract in SETTINGS["tool"]["importlinter"]["contracts"]]

# Contract → a file, and the one line in it that breaks the wall.
BREAKS = {
    "layers": ("signround_edge/formats/grid.py", "import signround_edge.files"),
    "core": ("signround_edge/tuning/loss_of_nothing.py", "import exporters.interface"),
    "exporters": ("exporters/gguf/packing_of_nothing.py", "import signround_edge.tuning.settings"),
    "exporters-apart": ("exporters/gguf/packing_of_nothing.py", "import exporters.onnx"),
    "runtimes": ("runtime_tests/temporary.py", "import signround_edge.tuning.schedule"),
    "worker": ("runtime_tests/worker/digest.py", "import torch"),
    "terminal": ("exporters/interface.py", "import click"),
    "circles": ("exporters/onnx/passes/circle.py", "import exporters.onnx.export"),
}


def lint(folder: Path, *contracts: str) -> subprocess.CompletedProcess[str]:
    chosen = [word for contract in contracts for word in ("--contract", contract)]
    command = [str(Path(sys.executable).with_name("lint-imports")), *chosen, "--no-cache"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy in which every contract is kept."""
    folder = tmp_path_factory.mktemp("walls")
    shutil.copy(ROOT / "pyproject.toml", folder)
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("*.txt", "__pycache__"))
    kept = lint(folder, *CONTRACTS)
    assert kept.returncode == 0, kept.stdout
    return folder


def test_every_contract_has_a_line_that_breaks_it() -> None:
    assert list(BREAKS) == CONTRACTS


@pytest.mark.parametrize("contract", CONTRACTS)
def test_contract_is_kept_and_fails_when_one_line_breaks_it(contract: str, copy: Path) -> None:
    name, line = BREAKS[contract]
    file = copy / name
    before = file.read_text(encoding="utf-8") if file.exists() else None
    file.write_text(f"{before or ''}\n{line}\n", encoding="utf-8")
    try:
        broken = lint(copy, contract)
    finally:
        if before is None:
            file.unlink()
        else:
            file.write_text(before, encoding="utf-8")
    assert broken.returncode == 1
    assert "BROKEN" in broken.stdout


def test_only_the_model_room_reads_config_json() -> None:
    found = [
        str(file.relative_to(ROOT))
        for package in PACKAGES
        for file in sorted((ROOT / package).rglob("*.py"))
        if any(
            isinstance(node, ast.Constant) and node.value == "config.json"
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        )
    ]
    assert found
    assert all(name.startswith("signround_edge/model/") for name in found)
