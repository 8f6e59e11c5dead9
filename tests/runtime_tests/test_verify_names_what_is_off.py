"""Mistakes that real exporters make: each fails on every runtime that can see it, and the report names what is off."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from exporters.gguf import GgufExporter
from exporters.interface import ExportOptions
from runtime_tests.report.report import VerifyReport
from runtime_tests.verify import verify
from signround_edge.run_directory import RunDirectory
from tests.runtime_tests import sabotage as s
from tests.support import make_run

# Mistakes that differ little from one that is always tried, here or in test_verify_catches_sabotage.py.
RARE = (
    "one wrong scale in one block",
    "wrong epsilon",
    "key rows not in llama.cpp's order",
    "norm weights of ones",
    "matrices of two layers exchanged",
    "RoPE scaling",
    "wrong head count",
    "sine and cosine exchanged",
    "interleaved RoPE",
    "no RoPE",
    "wrong attention scale",
    "soft cap",
    "a lost residual",
)
Check = Callable[[Path], VerifyReport]


def each(table: dict[str, s.Sabotage] | tuple[str, ...]) -> list[Any]:
    """Parameters: every name of a table, rare ones in the full matrix only."""
    return [pytest.param(what, marks=pytest.mark.full if what in RARE else ()) for what in table]


def reasons(report: VerifyReport) -> str:
    return " ".join(filter(None, [a.reason for a in report.artifacts] + [r.reason for r in report.runtimes]))


def assert_named(report: VerifyReport, sabotage: s.Sabotage) -> None:
    assert report.status == "fail"
    assert report.weights_exact is sabotage.weights_exact
    for name in sabotage.names:
        assert name in reasons(report)
    assert not any("could not be compared" in note for runtime in report.runtimes for note in runtime.notes)


@pytest.mark.parametrize("what", each(s.GGUF_WEIGHTS))
def test_gguf_weights(what: str, gguf: Path, check: Check) -> None:
    s.damage_gguf(gguf, s.GGUF_WEIGHTS[what].change)
    assert_named(check(gguf), s.GGUF_WEIGHTS[what])


@pytest.mark.parametrize("what", each(s.GGUF_METADATA))
def test_gguf_metadata(what: str, gguf: Path, check: Check) -> None:
    s.damage_gguf(gguf, s.GGUF_METADATA[what].change)
    assert_named(check(gguf), s.GGUF_METADATA[what])


@pytest.mark.parametrize("what", each(s.GGUF_CONTROL))
def test_gguf_of_a_template_with_wrong_metadata(
    what: str, run: RunDirectory, gguf_file: Path, tmp_path: Path, check: Check
) -> None:
    """Nobody knows which metadata a template should have, but its logits tell, and its hidden states tell where."""
    artifact = GgufExporter().export(run, tmp_path / "model.gguf", ExportOptions(template=gguf_file, log=str))
    s.damage_gguf(artifact, s.GGUF_METADATA[what].change)
    report = check(artifact)
    assert report.weights_exact
    assert "the control, which computes in floats, shows that the graph differs" in reasons(report)
    assert "model.layers.0 is the first layer that is off" in reasons(report)


def test_gguf_minimum_off_by_one_step(small_model: Path, text: Path, tmp_path: Path) -> None:
    """The zero point of Q4_1 is its minimum."""
    run = make_run(small_model, tmp_path / "run", "gguf:q4_1")
    artifact = GgufExporter().export(run, tmp_path / "model.gguf", ExportOptions(log=str))
    s.damage_gguf(artifact, s.on_rows("blk.0.attn_output.weight", s.minimum_off_by_one_step))
    report = verify(run, [artifact], text, n_ctx=64, max_windows=1, log=str)
    assert_named(report, s.Sabotage(str, ("tensor blk.0.attn_output.weight (Q4_1)",)))


@pytest.mark.parametrize("what", each(s.ONNX_WEIGHTS))
def test_onnx_weights(what: str, onnx_copy: Path, check: Check) -> None:
    s.damage_onnx(onnx_copy, s.ONNX_WEIGHTS[what].change)
    assert_named(check(onnx_copy), s.ONNX_WEIGHTS[what])


@pytest.mark.parametrize("what", each(s.ONNX_GRAPH))
def test_onnx_graph(what: str, onnx_copy: Path, check: Check) -> None:
    s.damage_onnx(onnx_copy, s.ONNX_GRAPH[what].change)
    assert_named(check(onnx_copy), s.ONNX_GRAPH[what])


def test_onnx_that_rounds_activations_fails_by_its_control(
    onnx_int8_folder: Path, tmp_path: Path, check: Check
) -> None:
    folder = shutil.copytree(onnx_int8_folder, tmp_path / "onnx")
    s.damage_onnx(folder, s.ONNX_GRAPH["another activation"].change)
    assert_named(check(folder), s.ONNX_GRAPH["another activation"])


def test_a_folder_whose_data_only_was_saved_anew_passes(onnx_copy: Path, check: Check) -> None:
    """The sabotages above fail because of what they change, not because the file was written again."""
    s.damage_onnx(onnx_copy, lambda _model: None)
    assert check(onnx_copy).passed


def test_a_gguf_that_only_was_written_anew_passes(gguf: Path, check: Check) -> None:
    s.damage_gguf(gguf, lambda _document: None)
    report = check(gguf)
    assert report.passed
    found = report.runtimes[0].divergence
    assert found is not None
    assert [layer.name for layer in found.layers] == [
        "token embedding",
        "model.layers.0",
        "model.layers.1",
        "model.norm",
    ]
    assert max(layer.error for layer in found.layers) < 5e-6
