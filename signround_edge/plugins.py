"""Exporters, runtimes and expectations of artifacts, found through entry points, so that a third party can add one."""

from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from signround_edge.errors import UserError

if TYPE_CHECKING:
    from exporters.interface import Exporter
    from runtime_tests.artifacts.expectation import Expect
    from runtime_tests.interface import Runtime


def exporters() -> dict[str, Exporter]:
    """Entry-point name ("gguf", "onnx") → exporter."""
    return _load("signround_edge.exporters")


def runtimes() -> dict[str, Runtime]:
    """Runtime name ("llama.cpp", "onnxruntime") → runtime."""
    return {runtime.name: runtime for runtime in _load("signround_edge.runtimes").values()}


def exporter_of(artifact: Path) -> Exporter:
    """The exporter whose format the artifact has; UserError when none knows it."""
    found = exporters()
    for exporter in found.values():
        if exporter.recognises(artifact):
            return exporter
    what = "an empty folder" if artifact.is_dir() and not any(artifact.iterdir()) else "nothing that is known here"
    formats = " or ".join(map(str.upper, found))
    raise UserError(
        f"{artifact} is {what}; give a run directory that `quantize` has written, or {formats} that `export` has"
    )


def expectation_of(format_: str) -> Expect | None:
    """What a package says that artifacts of an exporter's format should be; None where none says anything."""
    found = entry_points(group="signround_edge.expectations", name=format_)
    return next((point.load() for point in found), None)


def _load(group: str) -> dict[str, Any]:
    return {point.name: point.load()() for point in entry_points(group=group)}
