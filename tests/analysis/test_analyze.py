"""`analyze`: its counts are those that the codes themselves show, its pictures and its document are whole."""

from __future__ import annotations

import json
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from support import make_run

from signround_edge.analysis.roundings import analyze
from signround_edge.cli import main
from signround_edge.errors import UserError
from signround_edge.evaluation.torch_models import load_source_model
from signround_edge.run_directory import RunDirectory
from signround_edge.schemes.scheme import parse_scheme
from signround_edge.tuning.quantize import quantize
from signround_edge.tuning.settings import TuningSettings

SMALL = TuningSettings(steps=10, samples=8, seqlen=32, batch_size=4, lr=0.03, compute_dtype="float32")
PICTURES = {"altered-by-block.svg", "altered-by-matrix.svg", "salience.svg", "v.svg", "losses.svg"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, calibration_text: Path) -> dict[str, Path]:
    """The tiny model rounded and tuned on one grid (absmax: the initial scales need no calibration to be known)."""
    folder = tmp_path_factory.mktemp("runs")
    for name, steps in (("rounded", 0), ("tuned", SMALL.steps)):
        settings = TuningSettings(**{**vars(SMALL), "steps": steps, "scale_init": "absmax", "lr": 0.03})
        quantize(tiny_llama, parse_scheme("onnx:w4g32-asym"), folder / name, str(calibration_text), settings)
    return {name: folder / name for name in ("rounded", "tuned")}


def run_cli(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == code, result.output
    return result


def document(*arguments: object) -> Any:
    return json.loads(run_cli("analyze", *arguments, "--json").stdout)


def test_counts_are_those_of_the_codes(runs: dict[str, Path], tiny_llama: Path) -> None:
    rounded, tuned = RunDirectory.open(runs["rounded"]), RunDirectory.open(runs["tuned"])
    found = {t.name: t for t in analyze(tuned).tensors}
    source = dict(load_source_model(tiny_llama).named_parameters())
    assert len(found) == 35
    for name, tensor in found.items():
        before, after = rounded.quantized(name), tuned.quantized(name)
        moved = after.codes.int() - before.codes.int()  # scales of this grid are positive: a higher code is a raise
        assert tensor.roundings.weights == moved.numel()
        assert tensor.roundings.raised == pytest.approx(float((moved > 0).float().mean()))
        assert tensor.roundings.lowered == pytest.approx(float((moved < 0).float().mean()))
        blocks = after.grid.blocked(source[name].detach().float())
        nearest = after.grid.round_codes(blocks, after.fields).reshape(after.codes.shape)
        assert tensor.roundings.overruled == pytest.approx(float((nearest != after.codes).float().mean()))
        assert sum(tensor.v_histogram) == moved.numel()
    total = analyze(tuned).total
    assert total is not None
    assert 0.001 < total.raised < 0.5


def test_a_rounded_run_has_nothing_altered(runs: dict[str, Path]) -> None:
    found = document(runs["rounded"])
    assert found["total"]["altered"] == found["total"]["overruled"] == 0
    counts = found["v_histogram"]["counts"]
    assert counts[len(counts) // 2] == sum(counts) == found["total"]["weights"]
    assert any("--steps 0" in note for note in found["notes"])


def test_a_run_is_never_worse_than_rounding(runs: dict[str, Path]) -> None:
    found = document(runs["tuned"])
    assert [loss["block"] for loss in found["losses"]] == [0, 1, 2, 3, 4]
    assert all(loss["tuned"] <= loss["start"] <= loss["rounded"] for loss in found["losses"])
    assert any(loss["tuned"] < loss["rounded"] for loss in found["losses"])
    assert found["worse_than_rounding"] == []


def test_shares_add_up(runs: dict[str, Path]) -> None:
    found = document(runs["tuned"])
    assert {kind["kind"] for kind in found["kinds"]} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip
    for groups in (found["tensors"], found["blocks"], found["kinds"]):
        assert sum(g["weights"] for g in groups) == found["total"]["weights"]
        altered = sum(g["altered"] * g["weights"] for g in groups) / found["total"]["weights"]
        assert altered == pytest.approx(found["total"]["altered"])
    for tensor in found["tensors"]:
        assert tensor["altered"] == pytest.approx(tensor["raised"] + tensor["lowered"])
        assert sum(tensor["altered_by_salience"]) / 20 == pytest.approx(tensor["altered"], rel=0.05)
        assert 0 <= tensor["salient_overlap"] <= 1


def test_folder_holds_pictures_page_and_document(runs: dict[str, Path], tmp_path: Path) -> None:
    printed = document(runs["tuned"], "--out", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "analysis.json").read_text()) == printed
    assert {p.name for p in (tmp_path / "out").glob("*.svg")} == PICTURES
    for name in PICTURES:
        ElementTree.parse(tmp_path / "out" / name)
    page = (tmp_path / "out" / "analysis.html").read_text()
    assert page.count("<svg") == len(PICTURES)
    assert "src=" not in page
    assert "http://" not in page.replace("http://www.w3.org/2000/svg", "")
    shown = " ".join(run_cli("analyze", runs["tuned"]).stdout.split())
    assert "worse than plain rounding: none of 5" in shown
    assert "of largest E[x²]" in shown


def test_layer_wise_runs_show_each_matrix(tmp_path: Path, tiny_llama: Path, calibration_text: Path) -> None:
    settings = TuningSettings(**{**vars(SMALL), "steps": 2, "granularity": "layer"})
    quantize(tiny_llama, parse_scheme("gguf:q2_k"), tmp_path / "run", str(calibration_text), settings)
    found = document(tmp_path / "run", "--out", tmp_path / "out")
    assert len(found["losses"]) == len(found["tensors"]) == 35
    assert {t["type"] for t in found["tensors"]} == {"Q2_K", "Q3_K"}


def test_older_runs_say_what_is_missing(tiny_llama: Path, tmp_path: Path) -> None:
    make_run(tiny_llama, tmp_path / "run", "gguf:q4_0")
    found = document(tmp_path / "run", "--out", tmp_path / "out")
    assert found["total"] is None
    assert "quantize it anew" in found["notes"][0]
    assert not list((tmp_path / "out").glob("*.svg"))


def test_manifests_without_statistics_are_read(runs: dict[str, Path], tmp_path: Path) -> None:
    run = shutil.copytree(runs["tuned"], tmp_path / "run")
    shutil.rmtree(run / "statistics")
    manifest = json.loads((run / "manifest.json").read_text())
    for record in manifest["complete"].values():
        del record["statistics_sha256"]
    (run / "manifest.json").write_text(json.dumps(manifest))
    found = document(run)
    assert found["tensors"] == []
    assert len(found["losses"]) == 5


def test_changed_statistics_are_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    run = shutil.copytree(runs["tuned"], tmp_path / "run")
    file = run / "statistics" / "0002.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match=r"0002\.safetensors is missing or was changed"):
        analyze(RunDirectory.open(run))
    assert "Traceback" not in run_cli("analyze", run, code=2).output
    assert RunDirectory.open(run).quantized("model.layers.2.mlp.up_proj.weight").problem() is None  # still exportable


def test_bad_input_is_one_sentence(runs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert "give a folder" in run_cli("analyze", runs["tuned"], "--out", tmp_path / "file", code=2).stderr
    assert "absent does not exist; give the folder" in run_cli("analyze", tmp_path / "absent", code=2).stderr
