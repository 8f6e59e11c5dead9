"""The command line as scripts use it: the whole chain on the tiny model, JSON documents, exit codes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from signround_edge.cli import main


def run_cli(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == code, result.output
    return result


def json_of(*arguments: object, code: int = 0) -> Any:
    return json.loads(run_cli(*arguments, "--json", code=code).stdout)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, calibration_text: Path) -> Path:
    """A folder with `run`, `model.gguf` and `onnx`, made by the commands of the README."""
    folder = tmp_path_factory.mktemp("chain")
    sizes = ["--steps", "4", "--samples", "8", "--seqlen", "32"]
    scheme = ["--scheme", "gguf:q4_0,onnx:w4g32", "--calibration", calibration_text]
    run_cli("quantize", tiny_llama, *scheme, "-o", folder / "run", *sizes)
    run_cli("export", folder / "run", "--format", "gguf", "-o", folder / "model.gguf")
    run_cli("export", folder / "run", "--format", "onnx", "-o", folder / "onnx")
    return folder


def test_verify_passes_on_both_runtimes(chain: Path, tiny_llama: Path, evaluation_text: Path) -> None:
    report = chain / "report"
    options = ["--text", evaluation_text, "--reference", tiny_llama, "--n-ctx", 128, "--windows", 4, "--report", report]
    document = json_of("verify", chain / "run", chain / "model.gguf", chain / "onnx", *options)
    assert document["weights_exact"] is True
    assert document["tensors_checked"] > 0
    assert {r["name"]: r["status"] for r in document["runtimes"]} == {"llama.cpp": "pass", "onnxruntime": "pass"}
    for runtime in document["runtimes"]:
        assert {"device", "reason", "ppl", "ppl_reference", "kld_mean", "top1_agreement"} <= set(runtime)
    assert document["runtimes"][0]["control_kld_mean"] <= 1e-5
    certificate = json.loads((report / "certificate.json").read_text())
    assert {key: certificate[key] for key in document if key != "runtimes"} == {
        key: value for key, value in document.items() if key != "runtimes"
    }
    for certified, runtime in zip(certificate["runtimes"], document["runtimes"], strict=True):
        assert runtime.items() <= certified.items()
    assert "<strong>PASS</strong>" in (report / "certificate.html").read_text()


def test_a_certificate_is_checked_without_running_anything(chain: Path, evaluation_text: Path, tmp_path: Path) -> None:
    shutil.copy(chain / "model.gguf", tmp_path / "model.gguf")
    shutil.copytree(chain / "run", tmp_path / "run")
    options = ["--text", evaluation_text, "--n-ctx", 64, "--windows", 1, "--report", tmp_path / "report"]
    run_cli("verify", tmp_path / "run", tmp_path / "model.gguf", *options)
    certificate = tmp_path / "report" / "certificate.json"
    assert "verdict pass" in run_cli("verify", "--check", certificate).stdout
    assert json_of("verify", "--check", certificate)["status"] == "pass"
    with (tmp_path / "model.gguf").open("ab") as file:
        file.write(b"x")
    result = run_cli("verify", "--check", certificate, code=1)
    assert f"error: the artifact has changed since the verification: {tmp_path / 'model.gguf'}" in " ".join(
        result.stderr.split()
    ).replace("/report/..", "")
    run_cli("verify", "--check", tmp_path / "absent.json", code=2)
    assert "runs nothing" in run_cli("verify", tmp_path / "run", "--check", certificate, code=2).stderr


@pytest.mark.parametrize(
    ("arguments", "missing"),
    [([], "argument 'RUN'"), (["run"], "argument 'ARTIFACTS...'"), (["run", "model.gguf"], "option '--text'")],
)
def test_verify_says_which_argument_is_missing(arguments: list[str], missing: str) -> None:
    assert f"Missing {missing}" in run_cli("verify", *arguments, code=2).stderr


def test_flipped_byte_fails_verification_and_names_the_tensor(chain: Path, evaluation_text: Path) -> None:
    from exporters.gguf.container.reader import GgufFile

    broken = chain / "broken.gguf"
    data = bytearray((chain / "model.gguf").read_bytes())
    tensor = GgufFile.open(chain / "model.gguf").tensors["blk.1.ffn_up.weight"]
    data[tensor.offset + 5] ^= 0x10
    broken.write_bytes(data)
    options = ["--text", evaluation_text, "--n-ctx", 128, "--windows", 1]
    result = run_cli("verify", chain / "run", broken, *options, "--json", code=1)
    document = json.loads(result.stdout)
    assert document["weights_exact"] is False
    assert "blk.1.ffn_up.weight" in document["artifacts"][0]["first_difference"]


def test_inspect_agrees_with_the_files(chain: Path) -> None:
    run, gguf = json_of("inspect", chain / "run"), json_of("inspect", chain / "model.gguf")
    assert (run["format"], gguf["format"]) == ("run", "gguf")
    assert run["total_bytes"] == gguf["total_bytes"]
    assert sum(t["bytes"] for t in gguf["tensors"]) == gguf["total_bytes"]
    assert {"name", "type", "shape", "bytes"} == set(gguf["tensors"][0])
    assert json_of("inspect", chain / "onnx")["format"] == "onnx"
    assert "total" in run_cli("inspect", chain / "run").stdout


def test_evaluate_model_run_and_artifact(chain: Path, tiny_llama: Path, evaluation_text: Path) -> None:
    options = ["--text", evaluation_text, "--n-ctx", 128, "--windows", 4]
    exact = json_of("evaluate", tiny_llama, *options)
    tuned = json_of("evaluate", chain / "run", *options, "--reference", tiny_llama)
    packed = json_of("evaluate", chain / "onnx", *options, "--reference", tiny_llama)
    assert {"ppl", "ppl_stderr", "tokens"} == set(exact)
    assert tuned["ppl_reference"] == pytest.approx(exact["ppl"])
    assert 0 < tuned["kld_mean"] < 0.1
    assert packed["kld_mean"] == pytest.approx(tuned["kld_mean"], rel=1e-3)


def test_devices_are_listed() -> None:
    assert "cpu-x86" in [d["name"] for d in json_of("devices")]


def test_unknown_export_format_is_bad_usage(chain: Path) -> None:
    result = run_cli("export", chain / "run", "--format", "tflite", "-o", chain / "x", code=2)
    assert "--format tflite is unknown; known are gguf, onnx" in result.stderr


@pytest.mark.full
def test_demo_works_from_a_wheel(tmp_path: Path) -> None:
    root = Path(__file__).parent.parent
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path, root]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, "-m", "signround_edge.cli", "demo", "--json"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    document = json.loads(done.stdout)
    assert document["verify"]["status"] == "pass"
    assert document["tuned"]["kld_mean"] < document["rounded"]["kld_mean"]
