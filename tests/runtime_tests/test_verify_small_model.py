"""`verify` on both real runtimes: a sound artifact passes, and says the figures of the contract."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from runtime_tests.verify import verify
from signround_edge.run_directory import RunDirectory
from signround_edge.terminal.verification import render

CONTRACT = ("name", "device", "status", "reason", "ppl", "ppl_reference", "kld_mean", "top1_agreement")
SMALL = {"n_ctx": 128, "max_windows": 4, "log": str}


def test_gguf_and_onnx_of_one_run_pass(
    run: RunDirectory, gguf_file: Path, onnx_folder: Path, onnx_int8_folder: Path, text: Path, small_model: Path
) -> None:
    report = verify(run, [gguf_file, onnx_folder, onnx_int8_folder], text, reference=small_model, **SMALL)
    Console(width=160).print(render(report))
    data = report.to_json()
    assert report.passed
    assert data["weights_exact"] is True
    assert [(r["name"], r["status"], r["gate"]) for r in data["runtimes"]] == [
        ("llama.cpp", "pass", "quantized"),
        ("onnxruntime", "pass", "exact"),
        ("onnxruntime", "pass", "quantized"),
    ]
    assert all(set(CONTRACT) <= set(r) for r in data["runtimes"])
    llama_cpp, onnx, onnx_int8 = data["runtimes"]
    assert llama_cpp["control_kld_mean"] <= 1e-5
    assert onnx["kld_mean"] <= 1e-5
    assert onnx_int8["control_kld_mean"] <= 1e-5
    assert 1e-5 < onnx_int8["kld_mean"] <= 0.02
    assert all(r["fidelity"]["kld_mean"] > r["kld_mean"] for r in data["runtimes"])
    assert all(r["notes"] == [] for r in data["runtimes"])
    json.dumps(data, allow_nan=False)
