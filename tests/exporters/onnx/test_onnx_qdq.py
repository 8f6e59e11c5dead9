"""`--operators qdq`: the run's integers as DequantizeLinear, bit for bit, through ONNX Runtime's own kernel."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray
from transformers import GPT2Config, LlamaConfig, Phi3Config, PretrainedConfig

from exporters.onnx.artifact.reader import changed_files, iter_expected, open_artifact, read_sidecar, read_tensors
from exporters.onnx.fused_level import set_fused_level
from exporters.onnx.qdq import packed_tensor
from runtime_tests.runtimes.onnx_weights import dequantize_through_runtime
from signround_edge.errors import UserError
from signround_edge.run_directory import RunDirectory
from signround_edge.schemes.scheme import Scheme, parse_scheme
from tests.exporters.onnx.conftest import BASE, Exported, export

MakeRun = Callable[..., RunDirectory]
Q2_0 = parse_scheme("gguf:q2_0").with_outside_types("q8_0", "q6_k")


@pytest.fixture(scope="module")
def llama_qdq(llama_run: RunDirectory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied Llama, decoder Q4_0, embedding and head Q6_K; tests that change files copy it first."""
    return export(llama_run, tmp_path_factory.mktemp("qdq") / "out", operators="qdq")


def differing(run: RunDirectory, folder: Path) -> list[str]:
    expected = {name: weights for name, _, weights in iter_expected(run, folder)}
    stored = dict(dequantize_through_runtime(folder))
    assert set(stored) == set(expected)
    return [name for name, weights in stored.items() if not np.array_equal(weights, expected[name]())]


def dequantize_nodes(folder: Path) -> list[ir.Node]:
    return [node for node in open_artifact(folder).graph if node.op_type == "DequantizeLinear"]


def types(folder: Path) -> set[str]:
    return {kind for _, kind, _, _ in read_tensors(folder) if kind.startswith("Deq")}


def data_bytes(folder: Path) -> int:
    return (folder / "model.onnx.data").stat().st_size


@pytest.mark.parametrize(
    ("scheme", "stored", "codes", "opset"),
    [
        ("onnx:w4g32", {"DequantizeLinear-4x32", "DequantizeLinear-8x32"}, {"INT4", "INT8"}, 22),
        ("onnx:w4g128-asym", {"DequantizeLinear-4x128", "DequantizeLinear-8x32"}, {"UINT4", "INT8"}, 22),
        ("onnx:w3g32", {"DequantizeLinear-4x32", "DequantizeLinear-8x32"}, {"INT4", "INT8"}, 22),
        ("onnx:w2g32-asym", {"DequantizeLinear-2x32", "DequantizeLinear-8x32"}, {"UINT2", "INT8"}, 25),
        # Rows of 256 have one scale, those of 512 two.
        ("onnx:w4g256", {"DequantizeLinear-4x256", "DequantizeLinear-8x32"}, {"INT4", "INT8"}, 22),
        # Its codes of −1 to 2 are no int2.
        (Q2_0, {"DequantizeLinear-2x64", "DequantizeLinear-8x16", "DequantizeLinear-8x32"}, {"UINT2", "INT8"}, 25),
    ],
)
def test_every_grid_keeps_its_weights(
    scheme: str | Scheme, stored: set[str], codes: set[str], opset: int, make_random_run: MakeRun, tmp_path: Path
) -> None:
    run = make_random_run(LlamaConfig(**{**BASE, "num_hidden_layers": 1}, tie_word_embeddings=False), scheme)
    folder = export(run, tmp_path / "out", operators="qdq")
    assert differing(run, folder) == []
    assert types(folder) == stored
    model = ir.load(folder / "model.onnx")
    weights = {node.inputs[0].dtype.name for node in dequantize_nodes(folder)}
    assert weights == codes
    assert model.opset_imports[""] == opset
    assert not {"MatMulNBits", "GatherBlockQuantized"} & {node.op_type for node in model.graph}
    onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])


def test_one_scale_a_row_is_the_form_per_channel(make_random_run: MakeRun, tmp_path: Path) -> None:
    run = make_random_run(LlamaConfig(**{**BASE, "num_hidden_layers": 1}, tie_word_embeddings=False), "onnx:w4g256")
    folder = export(run, tmp_path / "out", operators="qdq")
    forms = {
        (tuple(node.inputs[1].shape.numpy()), "block_size" in node.attributes, node.attributes["axis"].as_int())
        for node in dequantize_nodes(folder)
        if node.inputs[0].dtype == ir.DataType.INT4
    }
    # qkv, gate and up have rows of 256 values, down of 512, o of 256.
    assert forms == {((512,), False, 1), ((256,), False, 1), ((2, 256), True, 0)}


def test_a_tied_embedding_shares_the_bytes_of_the_head(
    llama_run: RunDirectory, llama_qdq: Path, llama_export: Exported
) -> None:
    assert differing(llama_run, llama_qdq) == []
    assert changed_files(llama_qdq) == []
    initializers = open_artifact(llama_qdq).graph.initializers
    bindings = [b for b in read_sidecar(llama_qdq).bindings if "lm_head" in b.name or "embed_tokens" in b.name]
    places = {
        (role, initializers[name].const_value.location, initializers[name].const_value.offset)
        for binding in bindings
        for role, name in binding.initializers.items()
    }
    assert len(bindings) == 2
    assert len(places) == 2  # codes and scales
    assert data_bytes(llama_qdq) < data_bytes(llama_export.folder)  # symmetric codes need no zero points


def test_onnx_runtime_fuses_every_matrix(llama_qdq: Path, tmp_path: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "fused.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(llama_qdq / "model.onnx", options, providers=["CPUExecutionProvider"])
    fused = onnx.load(tmp_path / "fused.onnx", load_external_data=False).graph.node
    matmuls = [node for node in ir.load(llama_qdq / "model.onnx").graph if node.op_type == "MatMul"]
    assert len(matmuls) == sum(node.op_type == "MatMulNBits" for node in fused) > 0
    assert not any(node.op_type == "MatMul" for node in fused)


def test_scales_in_f16_lose_nothing(llama_run: RunDirectory, llama_qdq: Path, tmp_path: Path) -> None:
    folder = export(llama_run, tmp_path / "out", operators="qdq", scale_dtype="f16")
    assert differing(llama_run, folder) == []
    assert data_bytes(folder) < data_bytes(llama_qdq)


@pytest.mark.parametrize(("role", "place"), [("weight", "codes"), ("scales", "scales")])
def test_one_flipped_bit_names_its_tensor(
    role: str, place: str, llama_run: RunDirectory, llama_qdq: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(llama_qdq, tmp_path / "out")
    binding = next(b for b in read_sidecar(folder).bindings if "layers.1/mlp/up_proj" in b.name and b.quantized)
    tensor = ir.load(folder / "model.onnx").graph.initializers[binding.initializers[role]].const_value
    data = bytearray((folder / "model.onnx.data").read_bytes())
    data[tensor.offset + tensor.length // 2] ^= 1
    (folder / "model.onnx.data").write_bytes(data)
    assert differing(llama_run, folder) == [binding.name], place


@pytest.mark.full
def test_a_traced_graph_takes_them_too(make_random_run: MakeRun, tmp_path: Path) -> None:
    config = GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=600, n_positions=64, bos_token_id=1, eos_token_id=2)
    run = make_random_run(config, "onnx:w4g32")
    folder = export(run, tmp_path / "out", operators="qdq")
    assert differing(run, folder) == []
    decoder = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]
    assert decoder["session_options"]["session.qdq_matmulnbits_accuracy_level"] == "0"
    whole = export(run, tmp_path / "whole", operators="qdq", no_cache=True)
    assert (
        'add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")' in (whole / "README.md").read_text()
    )
    with pytest.raises(UserError, match=r"needs a genai_config\.json, and this graph has none"):
        set_fused_level(whole / "genai_config.json", 4)


def test_the_level_stands_where_onnxruntime_genai_reads_it(llama_run: RunDirectory, tmp_path: Path) -> None:
    folder = export(llama_run, tmp_path / "out", operators="qdq", accuracy_level=4)
    options = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]["session_options"]
    assert options["session.qdq_matmulnbits_accuracy_level"] == "4"
    assert "Its own default is 4" in (folder / "README.md").read_text()


def test_what_does_not_go_together_is_refused(llama_run: RunDirectory, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--operators qdq holds integers, and --dtype f16 writes floats"):
        export(llama_run, tmp_path / "out", operators="qdq", dtype="f16")
    with pytest.raises(UserError, match="--ort-format: ONNX Runtime writes MatMulNBits"):
        export(llama_run, tmp_path / "out", operators="qdq", ort_format=True)
    with pytest.raises(UserError, match="--operators plain is unknown; known are matmulnbits and qdq"):
        export(llama_run, tmp_path / "out", operators="plain")


@pytest.mark.parametrize(
    ("dtype", "low", "high"),
    [(ir.DataType.INT4, -8, 7), (ir.DataType.UINT4, 0, 15), (ir.DataType.INT2, -2, 1), (ir.DataType.UINT2, 0, 3)],
)
def test_packing_is_onnx_s_own(dtype: ir.DataType, low: int, high: int) -> None:
    """Rows of an odd length: values go on in the byte where the row before ended."""
    values: NDArray[np.int8] = np.random.default_rng(0).integers(low, high + 1, (5, 7)).astype(np.int8)
    packed = packed_tensor(values if low < 0 else values.view(np.uint8), dtype, "codes")
    read = onnx.numpy_helper.to_array(ir.to_proto(packed))
    np.testing.assert_array_equal(read.astype(np.int8), values)


def test_a_template_of_an_old_opset_is_refused(
    make_random_run: Callable[[PretrainedConfig, str], RunDirectory], tmp_path: Path
) -> None:
    run = make_random_run(LlamaConfig(**{**BASE, "num_hidden_layers": 1}), "onnx:w4g32")
    template = export(run, tmp_path / "template", dtype="f32")
    model = onnx.load(template / "model.onnx", load_external_data=False)
    next(o for o in model.opset_import if o.domain == "").version = 17
    onnx.save(model, template / "model.onnx")
    with pytest.raises(UserError, match="needs opset 21, and the graph of --template has 17"):
        export(run, tmp_path / "out", operators="qdq", template=template)


def test_parts_of_one_matrix_are_matrices_of_their_own(make_random_run: MakeRun, tmp_path: Path) -> None:
    """Phi-3's gate and up projections are one parameter, and two in the builder's graph."""
    run = make_random_run(Phi3Config(**{**BASE, "num_hidden_layers": 1}), "onnx:w4g32")
    folder = export(run, tmp_path / "out", operators="qdq")
    assert [b.rows for b in read_sidecar(folder).bindings if "gate_up_proj" in b.title] == [((0, 512),), ((512, 1024),)]
    assert differing(run, folder) == []
