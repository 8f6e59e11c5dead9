"""OpenVINO as a runtime of `verify`: folders of either kind of operators, logits and stored weights."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import numpy as np
import pytest

from exporters.onnx import OnnxExporter
from exporters.onnx.artifact.reader import open_artifact
from exporters.onnx.options import OnnxOptions
from runtime_tests.runtimes.openvino import OpenVinoRuntime
from runtime_tests.transports.node import NodeTransport
from runtime_tests.verify import verify
from signround_edge.errors import UserError
from signround_edge.evaluation.perplexity import TorchSession
from signround_edge.evaluation.torch_models import load_run_model
from signround_edge.run_directory import RunDirectory
from tests.runtime_tests.conftest import quiet
from tests.support import make_run

TOKENS = np.random.default_rng(0).integers(0, 300, 100).astype(np.int32)
RUNTIME = OpenVinoRuntime()
needs_openvino = pytest.mark.skipif(RUNTIME.unavailable() is not None, reason=str(RUNTIME.unavailable()))


@pytest.fixture(scope="module")
def qdq_folder(run: RunDirectory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = OnnxOptions(operators="qdq", log=quiet)
    return OnnxExporter().export(run, tmp_path_factory.mktemp("qdq") / "model", options)


@needs_openvino
def test_both_kinds_of_operators_verify_in_openvino_and_onnx_runtime(
    run: RunDirectory, onnx_folder: Path, qdq_folder: Path, text: Path
) -> None:
    devices = ["cpu-openvino", "cpu-x86"]
    report = verify(run, [onnx_folder, qdq_folder], text, devices=devices, n_ctx=64, max_windows=2, log=str)
    found = [(r.name, r.status, r.gate, r.reason) for r in report.runtimes]
    assert found == [("openvino", "pass", "exact", None), ("onnxruntime", "pass", "exact", None)] * 2
    assert report.weights_exact
    assert all(r.parity is not None and r.parity.kld_mean is not None for r in report.runtimes)
    assert max(r.parity.kld_mean for r in report.runtimes if r.parity and r.parity.kld_mean is not None) < 1e-6


@needs_openvino
def test_its_logits_are_those_of_torch(run: RunDirectory, qdq_folder: Path) -> None:
    with RUNTIME.open(qdq_folder) as session:
        found = session.logits(TOKENS)
        assert session.vocab_size == found.shape[1]
    assert float(np.abs(found - TorchSession(load_run_model(run)).logits(TOKENS)).max()) < 1e-4


@needs_openvino
def test_a_changed_code_is_seen_through_openvino(
    run: RunDirectory, qdq_folder: Path, text: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(qdq_folder, tmp_path / "qdq")
    node = next(n for n in open_artifact(folder).quantized_nodes() if "up_proj" in str(n.name))
    tensor = node.inputs[0].const_value
    data = bytearray((folder / "model.onnx.data").read_bytes())
    data[tensor.offset + 5] ^= 1
    (folder / "model.onnx.data").write_bytes(data)
    report = verify(run, [folder], text, devices=["cpu-openvino"], n_ctx=32, max_windows=1, log=str)
    (artifact,) = report.artifacts
    assert artifact.status == "fail"
    assert str(artifact.reason).startswith(f"tensor {node.name} (DequantizeLinear-4x32) differs in 1 of")


@needs_openvino
def test_what_openvino_does_not_take_is_one_sentence(small_model: Path, tmp_path: Path) -> None:
    run = make_run(small_model, tmp_path / "run", "onnx:w2g32-asym")
    folder = OnnxExporter().export(run, tmp_path / "out", OnnxOptions(operators="qdq", log=quiet))
    with pytest.raises(UserError, match="OpenVINO refuses") as caught:
        RUNTIME.open(folder)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="OpenVINO refuses"):
        list(RUNTIME.stored_tensors(folder))


def test_without_the_package_or_elsewhere_it_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    assert OpenVinoRuntime(transport=NodeTransport()).unavailable() == (
        "it runs on this machine only (--device cpu-openvino)"
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install 'signround-edge[openvino]'" in str(RUNTIME.unavailable())
