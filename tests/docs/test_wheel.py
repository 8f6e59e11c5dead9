"""What `python -m build --wheel` packs, and that it installs beside nothing but its dependencies."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from tests.docs.documents import ROOT

PACKAGES = ("signround_edge", "exporters", "runtime_tests", "devices")
BESIDE = ("pyproject.toml", "README.md", "LICENSE")

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built in a copy: building leaves folders behind."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in BESIDE:
        shutil.copy(ROOT / name, source / name)
    for name in ("tests", "benchmarks"):  # what lies beside the packages stays out
        (source / name).mkdir()
        (source / name / "__init__.py").touch()
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", str(out), str(source)]
    subprocess.run(build, check=True, capture_output=True)
    (built,) = out.glob("signround_edge-*-py3-none-any.whl")
    return built


def test_it_holds_every_file_of_the_packages_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    files = {path.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file()}
    assert packed == {path.as_posix() for path in files if "__pycache__" not in path.parts}
    assert {f"{package}/py.typed" for package in PACKAGES[:3]} <= packed


def test_it_installs_and_its_command_works_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*command: object) -> str:
        arguments = [str(word) for word in command]
        done = subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run(python, "-m", "pip", "install", "-q", "--no-deps", wheel)
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")  # the tests' own
    command = python.with_name("signround-edge")
    where = run(python, "-c", "import signround_edge; print(signround_edge.__file__)")
    assert Path(where.strip()).is_relative_to(site)
    assert "cpu-x86" in run(command, "devices")
    model = run(python, "-c", "from signround_edge.demo import tiny_llama_path; print(tiny_llama_path())").strip()
    sizes = ["--steps", 0, "--samples", 2, "--seqlen", 32]
    run(command, "quantize", model, "--scheme", "gguf:q4_0,onnx:w4g32", "-o", "run", *sizes)
    run(command, "export", "run", "--format", "gguf", "-o", "model.gguf")
    run(command, "export", "run", "--format", "onnx", "-o", "onnx")
    text = Path(model).parent / "speeches-test.txt"
    run(command, "verify", "run", "model.gguf", "onnx", "--text", text, "--windows", 1, "--n-ctx", 64)
