"""The worker's code in one file: on a device there is no signround_edge, and of other packages only the worker's."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from exporters.onnx import OnnxExporter
from exporters.onnx.options import OnnxOptions
from runtime_tests.runtimes.onnx_runtime import OnnxRuntime
from runtime_tests.setup import worker_bundle as module
from runtime_tests.setup.cache import VARIABLE
from runtime_tests.setup.wheels import PINNED
from runtime_tests.setup.worker_bundle import worker_bundle
from runtime_tests.transports.process import ProcessWorker
from signround_edge.run_directory import RunDirectory

TOKENS = np.random.default_rng(0).integers(0, 300, 60).astype(np.int32)
OUTSIDE = {"signround_edge.errors", "signround_edge.evaluation.metrics"}
OF_THIS_MACHINE_ONLY = {"onnxruntime_genai", "openvino"}  # a runtime that is offered here, in this Python


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, str(tmp_path_factory.mktemp("cache")))
        worker_bundle.cache_clear()
        yield worker_bundle()
    worker_bundle.cache_clear()


def modules_of(bundle: Path) -> list[str]:
    names = (name.removesuffix(".py").removesuffix("/__init__") for name in zipfile.ZipFile(bundle).namelist())
    return [name.replace("/", ".") for name in names]


def only(folder: Path, *packages: str) -> Path:
    """A folder that exposes those installed packages and nothing else."""
    folder.mkdir()
    for package in packages:
        spec = importlib.util.find_spec(package)
        assert spec is not None
        assert spec.submodule_search_locations
        found = Path(spec.submodule_search_locations[0])
        for beside in (found, found.with_name(f"{package}.libs")):
            if beside.exists():
                (folder / beside.name).symlink_to(beside)
    return folder


def test_the_bundle_is_the_workers_folder_and_two_modules(bundle: Path) -> None:
    folder = Path(module.__file__).parents[1] / "worker"
    names = {f"runtime_tests.worker.{file.stem}" for file in folder.glob("*.py")} - {"runtime_tests.worker.__init__"}
    packages = {"runtime_tests", "runtime_tests.worker", "signround_edge", "signround_edge.evaluation"}
    assert set(modules_of(bundle)) == names | packages | OUTSIDE
    worker_bundle.cache_clear()
    assert worker_bundle() == bundle  # the same code has the same hash


def test_every_module_imports_where_there_is_nothing_but_numpy(bundle: Path, tmp_path: Path) -> None:
    names = modules_of(bundle)
    assert "runtime_tests.worker.ort_level" in names
    script = (
        "import importlib, sys\n"
        f"sys.path += [{str(bundle)!r}, {str(only(tmp_path / 'site', 'numpy'))!r}]\n"
        f"files = [importlib.import_module(name).__file__ for name in {names}]\n"
        f"print(all(file.startswith({str(bundle)!r}) for file in files))\n"
        "foreign = {name.partition('.')[0] for name in sys.modules} - {*sys.stdlib_module_names, '__main__'}\n"
        "print(sorted(name for name in foreign if not name.startswith('__mp_')))\n"
    )
    done = subprocess.run([sys.executable, "-I", "-S", "-c", script], capture_output=True, text=True)
    assert done.stdout == "True\n['numpy', 'runtime_tests', 'signround_edge']\n", done.stderr


def _run(node: ast.AST) -> Iterator[ast.AST]:
    """All that may run: what only a type checker reads is left out."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING"):
            yield from _run(child)


def test_no_import_leads_out_of_the_bundle_wherever_it_stands(bundle: Path) -> None:
    """Also those inside functions, which run on the device only when somebody asks for what they do."""
    known = {*modules_of(bundle), *sys.stdlib_module_names, *OF_THIS_MACHINE_ONLY}
    known |= {pinned.partition("==")[0] for pinned in PINNED} | {"ort_flatbuffers_py"}  # of onnxruntime
    archive = zipfile.ZipFile(bundle)
    for file in archive.namelist():
        for node in _run(ast.parse(archive.read(file))):
            if isinstance(node, ast.Import):
                wanted = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                wanted = [node.module or ""]
            else:
                continue
            ours = [name for name in wanted if name.startswith(("runtime_tests", "signround_edge", "exporters"))]
            others = [name.partition(".")[0] for name in wanted if name not in ours]
            assert {*ours, *others} <= known, (file, wanted)


def test_an_ort_file_runs_at_another_accuracy_level_on_a_device(
    run: RunDirectory, bundle: Path, tmp_path: Path
) -> None:
    """As its control does over ssh and under qemu: with ONNX Runtime, but without what reads graphs here (onnx_ir)."""
    options = OnnxOptions(accuracy_level=4, ort_format=True, log=str)
    file = OnnxExporter().export(run, tmp_path / "out", options) / "model.ort"
    site = only(tmp_path / "site", "numpy", "onnxruntime", "flatbuffers")
    environment = {"PYTHONPATH": f"{site}:{bundle}"}
    command = [sys.executable, "-S", "-P", "-m", "runtime_tests.worker"]
    with ProcessWorker(str(file), command, 60, environment) as worker:
        worker.call("open", runtime="onnxruntime", artifact=str(file), options={"accuracy_level": 0})
        there = worker.call("logits", {"tokens": TOKENS}).arrays["logits"]
    with OnnxRuntime().open(file, accuracy_level=0) as floats, OnnxRuntime().open(file) as int8:
        np.testing.assert_array_equal(there, floats.logits(TOKENS))
        assert not np.array_equal(there, int8.logits(TOKENS))
