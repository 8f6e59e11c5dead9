"""Artifact formats behind one face: which one a path has, and what to expect of it. The format is its exporter's name.

GGUF and ONNX have their own modules here. For another format, a package may register under its name, in the entry point
group `signround_edge.expectations`, a function like `expect_weights` in `runtime_tests.artifacts.weights_only`; without
one, that serves. What is asked of GGUF and ONNX files cannot be replaced: no installed package makes a proof weaker.
"""

from __future__ import annotations

from pathlib import Path

from runtime_tests.artifacts.expectation import Expect, Expectation
from runtime_tests.artifacts.gguf import expect_gguf
from runtime_tests.artifacts.onnx import expect_onnx
from runtime_tests.artifacts.weights_only import expect_weights
from signround_edge.errors import UserError
from signround_edge.plugins import expectation_of, exporter_of
from signround_edge.run_directory import RunDirectory

_OURS: dict[str, Expect] = {"gguf": expect_gguf, "onnx": expect_onnx}


def artifact_format(path: Path) -> str:
    """The name of the exporter that knows it, such as "gguf" or "onnx". UserError when it is not there or none does."""
    if not path.exists():
        raise UserError(f"{path} does not exist; give the path that `export` wrote")
    return exporter_of(path).name


def expect(run: RunDirectory, artifact: Path, format_: str, folder: Path) -> Expectation:
    """What an artifact of the run should be; its control is written into `folder`.

    Raises:
        UserError: the artifact is damaged, or its control cannot be made.
        CheckFailed: it was not exported from this run.
    """
    expect_format = _OURS.get(format_) or expectation_of(format_) or expect_weights
    return expect_format(run, artifact, folder)
