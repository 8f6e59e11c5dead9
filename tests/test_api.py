"""The Python API: the program of docs/api.md as it stands there, results as data, nothing heavy before it is used."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import signround_edge as se
from exporters.onnx import OnnxExporter
from signround_edge.cli import main as command_line
from signround_edge.formats import GRIDS

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "transformers", "numpy", "onnx", "onnxruntime", "gguf", "click", "rich")


def python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Where the program of docs/api.md ran, as it stands there, and what it printed."""
    (program,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.S)
    assert 12 <= len(program.splitlines()) <= 20
    folder, printed = tmp_path_factory.mktemp("api"), io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(printed):
        exec(compile(program, "docs/api.md", "exec"), {"__name__": "__main__"})
    return folder, printed.getvalue()


def test_the_documented_program_runs(chain: tuple[Path, str]) -> None:
    folder, printed = chain
    assert "held-out loss" in printed  # progress=print
    assert "bits a weight" in printed
    assert 0 < float(re.findall(r"KL divergence from the original: (.*)", printed)[0]) < 0.1
    proof = json.loads((folder / "proof" / "certificate.json").read_text(encoding="utf-8"))
    assert proof["status"] == "pass"


def test_results_are_what_the_command_line_prints(
    chain: tuple[Path, str], capsys: pytest.CaptureFixture[str], evaluation_text: Path
) -> None:
    folder, _ = chain
    command_line(["inspect", str(folder / "model-onnx"), "--json"], standalone_mode=False)
    assert json.loads(capsys.readouterr().out) == se.inspect(str(folder / "model-onnx")).to_json()
    options = ["--text", str(evaluation_text), "--windows", "1", "--n-ctx", "64"]
    command_line(["evaluate", str(folder / "run"), *options, "--json"], standalone_mode=False)
    scores = se.evaluate(folder / "run", evaluation_text, windows=1, n_ctx=64)
    assert json.loads(capsys.readouterr().out) == scores.to_json()


def test_an_export_is_a_path(chain: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = chain
    exported = se.export(folder / "run", "onnx", tmp_path / "out", accuracy_level=4, scale_dtype="f16")
    assert OnnxExporter().recognises(Path(exported))
    assert exported.to_json() == {"format": "onnx", "path": str(tmp_path / "out")}
    assert se.inspect(exported).total_bytes < se.inspect(folder / "model-onnx").total_bytes


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"format": "tflite"}, "--format tflite is unknown; known are gguf, onnx"),
        ({"format": "gguf", "accuracy_level": 4}, "--accuracy-level is for --format onnx"),
        ({"format": "onnx", "accuracy_level": 2}, "--accuracy-level 2 is unknown"),
        ({"format": "onnx", "dtype": "f8"}, "--dtype f8"),
        ({"format": "gguf", "split_max_size": "big"}, "big is not a size"),
        ({"format": "onnx", "split_max_size": "1T"}, "--max-shard-size 1T is not a size"),
    ],
)
def test_bad_usage_is_one_sentence(
    chain: tuple[Path, str], tmp_path: Path, arguments: dict[str, object], sentence: str
) -> None:
    with pytest.raises(se.UserError, match=re.escape(sentence)):
        se.export(chain[0] / "run", out=tmp_path / "out", **arguments)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_an_unknown_device_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(se.UserError, match="--device tpu is unknown; known are auto, cpu, cuda"):
        se.quantize(tiny_llama, "gguf:q4_0", tmp_path / "run", device="tpu")


def test_every_public_name_is_there_and_loaded_when_it_is_used(tmp_path: Path) -> None:
    assert all(hasattr(se, name) for name in se.__all__)
    assert set(se.__all__) <= set(dir(se))
    code = f"import sys, signround_edge; print([m for m in {HEAVY} if m in sys.modules])"
    assert python(code, tmp_path).stdout.strip() == "[]"
    code = f"import sys, signround_edge.cli; print([m for m in {HEAVY} if m in sys.modules])"
    assert python(code, tmp_path).stdout.strip() == "['click']"
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        se.quantise  # noqa: B018


def test_a_run_gives_its_tensors(chain: tuple[Path, str]) -> None:
    run = se.RunDirectory.open(chain[0] / "run")
    assert run.quantized("model.layers.0.mlp.up_proj.weight").grid is GRIDS["Q4_0"]
    assert run.config["model_type"] == "llama"


def test_a_run_is_opened_by_a_text_and_names_what_is_near_a_wrong_name(chain: tuple[Path, str]) -> None:
    run = se.RunDirectory.open(str(chain[0] / "run"))
    with pytest.raises(se.UserError, match=r"has no parameter 'model.layers.0.mlp.up.weight'; near it are .*up_proj"):
        run.quantized("model.layers.0.mlp.up.weight")
    for call in (run.dequantized, run.float_tensor, run.is_quantized, run.channel_scales, run.entry):
        with pytest.raises(se.UserError, match="has no parameter 'nope'"):
            call("nope")
    with pytest.raises(se.UserError, match=r"model\.norm\.weight is kept in floats; float_tensor"):
        run.quantized("model.norm.weight")
    with pytest.raises(se.UserError, match=r"up_proj\.weight is quantized; quantized or dequantized"):
        run.float_tensor("model.layers.0.mlp.up_proj.weight")
    for name, owner in run.manifest.tied.items():
        with pytest.raises(se.UserError, match=re.escape(f"{name} shares the data of {owner}; give that name")):
            run.quantized(name)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"settings": {}}, 'settings must be TuningSettings, such as RECIPES["fast"], not a value of type dict'),
        ({"settings": "fast"}, "settings must be TuningSettings"),
        ({"progress": 3}, "progress must be a function that takes a line of text"),
        ({"scheme": ["gguf:q4_0"]}, "--scheme must be a text such as gguf:q4_k_m, not a value of type list"),
        ({"model": 3}, "model must be a path, not a value of type int"),
        ({"model": ""}, "model is empty"),
        ({"out": None}, "-o (out) must be a path"),
        ({"out": ""}, "-o (out) is empty"),
        ({"calibration": b"text"}, "--calibration must be a path"),
        ({"tensor_type": 3}, "--tensor-type must be a text or a list of texts"),
        ({"tensor_type": [3]}, "--tensor-type must be a text or a list of texts"),
        ({"tensor_type": "ffn_dwon=Q6_K"}, "--tensor-type ffn_dwon=Q6_K: no matrix of this model"),
    ],
)
def test_wrong_arguments_of_quantize_are_one_sentence(
    tiny_llama: Path, tmp_path: Path, arguments: dict[str, object], sentence: str
) -> None:
    given = {"model": tiny_llama, "scheme": "gguf:q4_0", "out": tmp_path / "run", **arguments}
    with pytest.raises(se.UserError, match=re.escape(sentence)):
        se.quantize(**given)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_one_text_is_a_list_of_one(
    chain: tuple[Path, str], tiny_llama: Path, tmp_path: Path, evaluation_text: Path
) -> None:
    settings = se.TuningSettings(steps=0, samples=2, seqlen=16)
    run = se.quantize(tiny_llama, "gguf:q4_0", tmp_path / "run", settings=settings, tensor_type="ffn_down=Q8_0")
    assert run.quantized("model.layers.0.mlp.down_proj.weight").grid is GRIDS["Q8_0"]
    with pytest.raises(se.UserError, match="nowhere"):
        se.verify(chain[0] / "run", chain[0] / "model-q4_0.gguf", evaluation_text, devices="nowhere")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"windows": 0}, "--windows 0 must be at least 1"),
        ({"windows": 1.5}, "--windows 1.5 must be a whole number"),
        ({"n_ctx": 3}, "--n-ctx 3 must be at least 4"),
        ({"n_ctx": True}, "--n-ctx True must be a whole number"),
    ],
)
def test_the_bounds_of_the_command_line_hold_from_python(
    chain: tuple[Path, str], evaluation_text: Path, arguments: dict[str, int], sentence: str
) -> None:
    run, file = chain[0] / "run", chain[0] / "model-q4_0.gguf"
    with pytest.raises(se.UserError, match=re.escape(sentence)):
        se.evaluate(run, evaluation_text, **arguments)  # type: ignore[arg-type]
    with pytest.raises(se.UserError, match=re.escape(sentence)):
        se.verify(run, file, evaluation_text, **arguments)  # type: ignore[arg-type]


def test_nothing_is_no_proof(chain: tuple[Path, str], evaluation_text: Path) -> None:
    with pytest.raises(se.UserError, match="give at least one artifact"):
        se.verify(chain[0] / "run", [], evaluation_text)
    with pytest.raises(se.UserError, match="give at least one --device"):
        se.verify(chain[0] / "run", chain[0] / "model-q4_0.gguf", evaluation_text, devices=[])


def test_the_example_says_what_it_takes() -> None:
    command = [sys.executable, str(ROOT / "examples" / "quantize_and_verify.py")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    shown = subprocess.run([*command, "--help"], env=environment, capture_output=True, text=True, check=True).stdout
    assert "model calibration text out" in shown
    bare = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (bare.returncode, "Traceback" in bare.stderr) == (2, False)
