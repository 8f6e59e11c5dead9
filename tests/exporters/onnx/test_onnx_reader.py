from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from transformers import PretrainedConfig, Qwen3Config

from exporters.onnx import OnnxExporter
from exporters.onnx.artifact.reader import changed_files, iter_expected, open_artifact, read_tensors, resolve
from runtime_tests.runtimes.onnx_weights import dequantize_through_runtime
from signround_edge.errors import CheckFailed, UserError
from signround_edge.run_directory import RunDirectory
from tests.exporters.onnx.conftest import BASE, Exported


@pytest.fixture
def artifact(llama_export: Exported, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return shutil.copytree(llama_export.folder, tmp_path / "artifact")


def differing(run: RunDirectory, artifact: Path) -> list[str]:
    """Names of the tensors that are not the run's."""
    expected = {name: weights for name, _, weights in iter_expected(run, artifact)}
    stored = dequantize_through_runtime(artifact)
    return [name for name, weights in stored if not np.array_equal(weights, expected[name]())]


def flip(artifact: Path, initializer: str) -> None:
    """Flip one bit in the middle of an initializer in the data file."""
    tensor = ir.load(artifact / "model.onnx").graph.initializers[initializer].const_value
    data = bytearray((artifact / "model.onnx.data").read_bytes())
    data[tensor.offset + tensor.length // 2] ^= 1
    (artifact / "model.onnx.data").write_bytes(data)


def refused(artifact: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_tensors(artifact)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_tensors_are_listed_with_type_shape_and_bytes(artifact: Path) -> None:
    rows = {name: rest for name, *rest in read_tensors(artifact)}
    # Codes, f32 scales and zero points of [512, 256] at 4 bits in blocks of 32.
    assert rows["/model/layers.0/attn/qkv_proj/MatMulNBits"] == [
        "MatMulNBits-4x32",
        (512, 256),
        512 * 128 + 512 * 8 * 4 + 512 * 4,
    ]
    assert rows["model.layers.1.input_layernorm.weight"] == ["F32", (256,), 1024]
    assert rows["/model/embed_tokens/GatherBlockQuantized"][2] + rows["/lm_head/MatMulNBits"][2] == 600 * (256 + 80)


def test_the_exporter_recognises_and_inspects_folder_and_file(artifact: Path, tmp_path: Path) -> None:
    exporter = OnnxExporter()
    assert exporter.recognises(artifact)
    assert exporter.recognises(artifact / "model.onnx")
    assert not exporter.recognises(tmp_path)
    assert exporter.inspect(artifact) == exporter.inspect(artifact / "model.onnx")
    assert resolve(artifact) == artifact / "model.onnx"


def test_an_untouched_artifact_has_no_differences(artifact: Path, llama_run: RunDirectory) -> None:
    assert differing(llama_run, artifact) == []
    assert changed_files(artifact) == []


@pytest.mark.parametrize(
    ("initializer", "tensors"),
    [
        ("model.layers.1.attn.qkv_proj.MatMulNBits.qweight", ["/model/layers.1/attn/qkv_proj/MatMulNBits"]),
        ("model.layers.0.mlp.down_proj.MatMulNBits.scales", ["/model/layers.0/mlp/down_proj/MatMulNBits"]),
        ("model.layers.0.mlp.up_proj.MatMulNBits.qzeros", ["/model/layers.0/mlp/up_proj/MatMulNBits"]),
        ("lm_head.MatMulNBits.qweight", ["/model/embed_tokens/GatherBlockQuantized", "/lm_head/MatMulNBits"]),
        ("model.layers.1.mlp.up_proj.Add.bias", ["model.layers.1.mlp.up_proj.Add.bias"]),
    ],
)
def test_one_flipped_bit_names_its_tensor(
    initializer: str, tensors: list[str], artifact: Path, llama_run: RunDirectory
) -> None:
    flip(artifact, initializer)
    assert differing(llama_run, artifact) == tensors
    assert changed_files(artifact) == ["model.onnx.data"]


def test_changed_and_missing_files_are_named(artifact: Path) -> None:
    (artifact / "genai_config.json").write_text("{}")
    (artifact / "tokenizer.json").unlink()
    assert changed_files(artifact) == ["genai_config.json", "tokenizer.json"]


def test_missing_or_truncated_data_is_one_sentence(artifact: Path) -> None:
    data = artifact / "model.onnx.data"
    whole = data.read_bytes()
    data.write_bytes(whole[:-1000])
    assert "model.onnx.data is truncated" in refused(artifact)
    data.unlink()
    assert "model.onnx.data is missing" in refused(artifact)


@pytest.mark.parametrize("keep", [0, 1, 100, 5000, -1])
def test_a_truncated_model_file_is_one_sentence(keep: int, artifact: Path) -> None:
    model = artifact / "model.onnx"
    model.write_bytes(model.read_bytes()[:keep])
    assert "model.onnx" in refused(artifact)


def test_what_is_no_onnx_is_one_sentence(tmp_path: Path) -> None:
    assert "does not exist" in refused(tmp_path / "nowhere")
    assert "holds 0 .onnx files" in refused(tmp_path)
    (tmp_path / "model.onnx").write_text("GGUF or some other thing")
    assert "not a readable ONNX file" in refused(tmp_path)


def test_flipped_bytes_of_the_model_file_never_end_in_a_traceback(artifact: Path, llama_run: RunDirectory) -> None:
    model = artifact / "model.onnx"
    whole = model.read_bytes()
    for position in np.random.default_rng(0).integers(0, len(whole), 60):
        broken = bytearray(whole)
        broken[position] ^= 0x15
        model.write_bytes(broken)
        try:
            read_tensors(artifact)
            list(iter_expected(llama_run, artifact))
            open_artifact(artifact).quantized_nodes()
        except UserError:
            continue
        assert changed_files(artifact) == ["model.onnx"]


def test_a_renamed_initializer_is_caught(artifact: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = artifact / "model.onnx"
    name = b"model.layers.0.mlp.up_proj.MatMulNBits.qzeros"
    model.write_bytes(model.read_bytes().replace(name, name[:-1] + b"z", 1))
    assert "reads model.layers.0.mlp.up_proj.MatMulNBits.qzero" in refused(artifact)
    assert capfd.readouterr() == ("", "")


def test_data_outside_the_folder_is_refused(artifact: Path, tmp_path: Path) -> None:
    shutil.copy(artifact / "model.onnx.data", tmp_path / "secret.data")
    model = artifact / "model.onnx"
    model.write_bytes(model.read_bytes().replace(b"model.onnx.data", b"../secret.data "))
    assert "outside the folder" in refused(artifact)


def test_a_missing_or_broken_sidecar_is_one_sentence(artifact: Path, llama_run: RunDirectory) -> None:
    sidecar = artifact / "signround_edge.json"
    sidecar.write_text('{"format": "onnx"')
    with pytest.raises(UserError, match="not readable"):
        list(iter_expected(llama_run, artifact))
    sidecar.unlink()
    assert len(read_tensors(artifact)) > 10
    with pytest.raises(UserError, match="no export of signround-edge"):
        list(iter_expected(llama_run, artifact))


def test_a_sidecar_that_hides_a_tensor_is_caught(artifact: Path, llama_run: RunDirectory) -> None:
    sidecar = artifact / "signround_edge.json"
    data = json.loads(sidecar.read_text())
    data["tensors"] = [t for t in data["tensors"] if t["node"] != "/model/layers.0/mlp/up_proj/MatMulNBits"]
    sidecar.write_text(json.dumps(data))
    with pytest.raises(CheckFailed, match=r"layers\.0\.mlp\.up_proj\.weight"):
        list(iter_expected(llama_run, artifact))


def test_the_run_of_another_model_is_refused(
    artifact: Path, make_random_run: Callable[[PretrainedConfig, str], RunDirectory]
) -> None:
    run = make_random_run(Qwen3Config(**{**BASE, "num_hidden_layers": 1}), "onnx:w4g32")
    with pytest.raises(UserError, match="another model"):
        next(iter_expected(run, artifact))


def test_other_peoples_dequantized_biases_and_kernels_are_listed_as_they_are(tmp_path: Path) -> None:
    """DequantizeLinear stands in front of anything; only a matrix of codes is a quantized matrix."""
    arrays = {"bias": np.ones(4, np.int32), "kernel": np.ones((4, 3, 2, 2), np.int8), "codes": np.ones((4, 8), np.int8)}
    nodes = [ir.node("DequantizeLinear", [value(name, array), value(f"{name}.scale", np.float32(0.5))], name=f"/{name}")
             for name, array in arrays.items()]  # fmt: skip
    initializers = [operand for node in nodes for operand in node.inputs]
    graph = ir.Graph(
        [], [node.outputs[0] for node in nodes], nodes=nodes, initializers=initializers, opset_imports={"": 21}
    )
    for node in nodes:
        node.outputs[0].name = f"{node.name}/output"
    ir.save(ir.Model(graph, ir_version=10), tmp_path / "model.onnx")
    rows = {name: (kind, shape) for name, kind, shape, _ in read_tensors(tmp_path)}
    assert rows["bias"] == ("I32", (4,))
    assert rows["kernel"] == ("I8", (4, 3, 2, 2))
    assert rows["/codes"] == ("DequantizeLinear-8x4", (8, 4))  # [K, N] in front of a MatMul


def value(name: str, array: object) -> ir.Value:
    tensor = ir.Tensor(np.asarray(array), name=name)
    return ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
