"""The artifact formats that `verify` knows, behind one face: which one a path is, and what to expect of it."""

from __future__ import annotations

from pathlib import Path

from runtime_tests.artifacts.expectation import Expectation
from runtime_tests.artifacts.gguf import expect_gguf
from runtime_tests.artifacts.onnx import expect_onnx
from signround_edge.errors import UserError
from signround_edge.plugins import exporter_of
from signround_edge.run_directory import RunDirectory


def artifact_format(path: Path) -> str:
    """Either "gguf" or "onnx". UserError when it is neither, by its name and its first bytes."""
    if not path.exists():
        raise UserError(f"{path} does not exist; give the path that `export` wrote")
    return exporter_of(path).name


def expect(run: RunDirectory, artifact: Path, format_: str, folder: Path) -> Expectation:
    """What an artifact of the run should be; its control is written into `folder`.

    Raises:
        UserError: the artifact is damaged, or its control cannot be made.
        CheckFailed: it was not exported from this run.
    """
    return expect_onnx(run, artifact) if format_ == "onnx" else expect_gguf(run, artifact, folder)
