"""ONNX Runtime as a runtime of `verify`: logits, stored weights, refusals."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

from exporters.onnx import OnnxExporter
from exporters.onnx.options import OnnxOptions
from runtime_tests.runtimes.onnx_genai import OnnxRuntimeGenai
from runtime_tests.runtimes.onnx_runtime import OnnxRuntime
from runtime_tests.verify import verify
from signround_edge.errors import UserError
from signround_edge.evaluation.perplexity import TorchSession
from signround_edge.evaluation.torch_models import load_run_model
from signround_edge.run_directory import RunDirectory

TOKENS = np.random.default_rng(0).integers(0, 300, 150).astype(np.int32)


def test_logits_at_accuracy_level_0_are_those_of_torch(onnx_folder: Path, run: RunDirectory) -> None:
    with OnnxRuntime().open(onnx_folder) as session:
        found = session.logits(TOKENS)
        np.testing.assert_array_equal(found, session.logits(TOKENS))
    expected = TorchSession(load_run_model(run)).logits(TOKENS)
    assert found.shape == expected.shape
    assert float(np.abs(found - expected).max()) < 1e-4


def test_the_accuracy_level_can_be_overridden_without_touching_the_file(
    onnx_folder: Path, onnx_int8_folder: Path
) -> None:
    before = (onnx_int8_folder / "model.onnx").read_bytes()
    with OnnxRuntime().open(onnx_folder) as session:
        floats = session.logits(TOKENS)
    with OnnxRuntime().open(onnx_int8_folder) as session:
        assert not np.array_equal(session.logits(TOKENS), floats)
    with OnnxRuntime().open(onnx_int8_folder, accuracy_level=0) as session:
        np.testing.assert_array_equal(session.logits(TOKENS), floats)
    assert (onnx_int8_folder / "model.onnx").read_bytes() == before


def test_a_folder_and_its_onnx_file_are_the_same_artifact(onnx_folder: Path) -> None:
    with OnnxRuntime().open(onnx_folder) as folder, OnnxRuntime().open(onnx_folder / "model.onnx") as file:
        np.testing.assert_array_equal(folder.logits(TOKENS), file.logits(TOKENS))


def test_stored_tensors_name_their_format(onnx_folder: Path) -> None:
    types = {t.name: t.stored_type for t in OnnxRuntime().stored_tensors(onnx_folder)}
    assert "MatMulNBits-4x32" in types.values()
    assert "F32" in types.values()
    assert "unknown" not in types.values()


@pytest.mark.parametrize("content", [b"", b"not a protobuf", bytes(200)])
def test_a_file_that_is_no_model_is_one_sentence(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(UserError, match=r"model\.onnx"):
        OnnxRuntime().open(tmp_path / "model.onnx")
    with pytest.raises(UserError, match=tmp_path.name):
        OnnxRuntime().open(tmp_path)


def test_a_model_that_is_no_decoder_is_one_sentence(tmp_path: Path) -> None:
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    out = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "g", [value], [out])
    opset = [onnx.helper.make_opsetid("", 17)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=10), tmp_path / "model.onnx")
    with pytest.raises(UserError, match="is not a decoder"):
        OnnxRuntime().open(tmp_path / "model.onnx")


def test_missing_external_data_is_one_sentence(onnx_folder: Path, tmp_path: Path) -> None:
    shutil.copy(onnx_folder / "model.onnx", tmp_path)
    with pytest.raises(UserError, match="ONNX Runtime refuses"):
        OnnxRuntime().open(tmp_path / "model.onnx")


def test_onnxruntime_genai_verifies_and_computes_the_same(
    run: RunDirectory, onnx_folder: Path, onnx_int8_folder: Path, text: Path
) -> None:
    report = verify(run, [onnx_folder, onnx_int8_folder], text, devices=["cpu-genai"], n_ctx=64, max_windows=2, log=str)
    found = [(r.name, r.status, r.gate, r.reason) for r in report.runtimes]
    assert found == [("onnxruntime-genai", "pass", "exact", None), ("onnxruntime-genai", "pass", "quantized", None)]
    with OnnxRuntime().open(onnx_folder) as plain, OnnxRuntimeGenai().open(onnx_folder) as genai:
        np.testing.assert_array_equal(plain.logits(TOKENS), genai.logits(TOKENS))


def test_a_graph_without_cache_is_not_for_onnxruntime_genai(onnx_folder: Path, tmp_path: Path) -> None:
    for name in ("model.onnx", "model.onnx.data"):
        shutil.copy(onnx_folder / name, tmp_path)
    with pytest.raises(UserError, match="runs in plain ONNX Runtime only"):
        OnnxRuntimeGenai().open(tmp_path)


def test_standard_operators_have_a_level_and_a_control(run: RunDirectory, text: Path, tmp_path: Path) -> None:
    options = OnnxOptions(operators="qdq", accuracy_level=4, log=str)
    folder = OnnxExporter().export(run, tmp_path / "qdq", options)
    report = verify(run, [folder], text, devices=["cpu-x86", "cpu-genai"], n_ctx=64, max_windows=2, log=str)
    assert [(r.status, r.gate, r.reason) for r in report.runtimes] == [("pass", "quantized", None)] * 2
    for runtime in report.runtimes:
        assert runtime.parity is not None
        assert runtime.control is not None
        assert runtime.parity.kld_mean > 10 * abs(runtime.control.kld_mean)  # type: ignore[operator, arg-type]
