from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from exporters.onnx.artifact.reader import changed_files, iter_expected, open_artifact, read_tensors
from exporters.onnx.builder_classes import BuilderClass
from exporters.onnx.routes import built
from runtime_tests.runtimes.onnx_weights import dequantize_through_runtime
from signround_edge.errors import UserError
from signround_edge.run_directory import RunDirectory
from signround_edge.schemes.scheme import parse_scheme
from tests.exporters.onnx.conftest import BASE, VOCABULARY, Exported, export
from tests.support import dequantized_model

TOKENS = torch.randint(3, VOCABULARY, (1, 96), generator=torch.Generator().manual_seed(1))

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
MIXED = parse_scheme("onnx:w2g32-asym").with_overrides((r"down_proj=w8g32", r"layers\.1\.self_attn\.v=w4g16-asym"))
FAMILIES = {
    "llama-untied": (LlamaConfig(**BASE), "onnx:w4g32"),
    "llama-tied-k-quant-head": (LlamaConfig(**BASE, tie_word_embeddings=True), "gguf:q5_0"),
    "llama-3-rope": (LlamaConfig(**BASE, rope_parameters=LLAMA3_ROPE), "onnx:w8g16"),
    "llama-rows-without-a-block": (LlamaConfig(**{**BASE, "hidden_size": 72, "head_dim": 16}), "onnx:w4g32"),
    "llama-rows-of-half-blocks": (LlamaConfig(**{**BASE, "hidden_size": 80, "head_dim": 16}), "onnx:w4g32"),
    "llama-mixed-types": (LlamaConfig(**BASE), MIXED.with_outside_types("w2g16", "w3g64-asym")),
    "qwen2-tied-4-bits": (
        Qwen2Config(**BASE, tie_word_embeddings=True),
        parse_scheme("onnx:w4g32").with_outside_types("w4g128-asym", None),
    ),
    "llama-rows-with-smaller-blocks": (LlamaConfig(**{**BASE, "hidden_size": 96}), "onnx:w4g128-asym"),
    "mistral-window": (MistralConfig(**BASE, sliding_window=16), "onnx:w4g64-asym"),
    "qwen2-biases": (Qwen2Config(**BASE), "onnx:w4g128-asym"),
    "qwen2-window": (Qwen2Config(**BASE, use_sliding_window=True, sliding_window=16, max_window_layers=1), "gguf:q8_0"),
    "llama-2-bits": (LlamaConfig(**BASE), "onnx:w2g32"),
    "qwen2-3-bits": (Qwen2Config(**BASE), "onnx:w3g64-asym"),
    "llama-per-channel": (LlamaConfig(**{**BASE, "hidden_size": 96}), "onnx:w4"),
    "qwen3-qk-norms": (Qwen3Config(**BASE, tie_word_embeddings=True), "onnx:w8g64"),
}


def onnx_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """f32 [n, vocab] through plain ONNX Runtime, from an empty cache."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(folder / "model.onnx", options)
    config = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]
    cache = np.zeros((1, config["num_key_value_heads"], 0, config["head_size"]), dtype=np.float32)
    feeds = {i.name: cache for i in session.get_inputs() if i.name.startswith("past")}
    feeds |= {"input_ids": tokens.numpy(), "attention_mask": np.ones(tokens.shape, dtype=np.int64)}
    return torch.from_numpy(session.run(["logits"], feeds)[0][0])


def mean_kl(reference: torch.Tensor, logits: torch.Tensor) -> float:
    p, q = (torch.log_softmax(x.double(), -1) for x in (reference, logits))
    return float((p.exp() * (p - q)).sum(-1).mean())


def torch_logits(run: RunDirectory, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return dequantized_model(run)(tokens).logits[0].float()


def generated(folder: Path, prompt: list[int], length: int) -> list[int]:
    """Tokens that onnxruntime-genai gives, prompt included."""
    import onnxruntime_genai

    model = onnxruntime_genai.Model(str(folder))
    parameters = onnxruntime_genai.GeneratorParams(model)
    parameters.set_search_options(max_length=length, do_sample=False)
    generator = onnxruntime_genai.Generator(model, parameters)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    return list(generator.get_sequence(0))


def expected_tokens(run: RunDirectory, prompt: list[int], length: int) -> list[int]:
    model = dequantized_model(run)
    return model.generate(torch.tensor([prompt]), max_length=length, do_sample=False)[0].tolist()


def assert_weights_equal(run: RunDirectory, folder: Path) -> None:
    """Every tensor of the folder, through ONNX Runtime, equals the run's; nothing is missing on either side."""
    expected = {name: weights for name, _, weights in iter_expected(run, folder)}
    for name, weights in dequantize_through_runtime(folder):
        assert np.array_equal(weights, expected.pop(name)()), name
    assert not expected


# Those that differ from another in the type or in one dimension.
ALIKE = (
    "llama-rows-of-half-blocks",
    "llama-rows-with-smaller-blocks",
    "qwen2-biases",
    "qwen2-window",
    "llama-2-bits",
    "llama-per-channel",
)


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=pytest.mark.full if name in ALIKE else ()) for name in FAMILIES]
)
def family(
    request: pytest.FixtureRequest,
    make_random_run: Callable[[PretrainedConfig, str], RunDirectory],
    tmp_path_factory: pytest.TempPathFactory,
) -> Exported:
    run = make_random_run(*FAMILIES[request.param])
    return Exported(run, export(run, tmp_path_factory.mktemp("family") / "out"))


def test_every_stored_weight_equals_the_run_bit_for_bit(family: Exported) -> None:
    assert_weights_equal(family.run, family.folder)
    assert changed_files(family.folder) == []


def test_logits_agree_with_torch(family: Exported) -> None:
    reference = torch_logits(family.run, TOKENS)
    assert reference.std() > 0.5
    assert mean_kl(reference, onnx_logits(family.folder, TOKENS)) <= 1e-9  # the issue asks for 1e-5; seen: 3e-12


def test_every_matmul_has_explicit_two_dimensional_zero_points_and_the_accuracy_level(family: Exported) -> None:
    artifact = open_artifact(family.folder)
    for node in artifact.quantized_nodes():
        assert all(value is not None for value in node.inputs[:4])
        scales, zeros = (artifact.graph.initializers[node.inputs[i].name] for i in (2, 3))
        assert len(scales.shape) == len(zeros.shape) == 2
        if node.op_type == "MatMulNBits":
            assert node.attributes["accuracy_level"].as_int() == 0


def test_a_tied_embedding_shares_the_heads_bytes(llama_export: Exported) -> None:
    graph = open_artifact(llama_export.folder).graph
    embedding = graph.initializers["model.embed_tokens.MatMulNBits.qweight"].const_value
    head = graph.initializers["lm_head.MatMulNBits.qweight"].const_value
    assert isinstance(embedding, ir.ExternalTensor)
    assert (embedding.location, embedding.offset, embedding.length) == (head.location, head.offset, head.length)
    gather = next(node for node in graph if node.op_type == "GatherBlockQuantized")
    assert [value.name for value in gather.inputs[2:]] == ["lm_head.MatMulNBits.scales", "lm_head.MatMulNBits.qzeros"]
    stored = sum(size for *_, size in read_tensors(llama_export.folder))
    data = (llama_export.folder / "model.onnx.data").stat().st_size
    assert abs(stored - data) < 32_000  # small tensors are in model.onnx, and tensors are aligned


@pytest.fixture(scope="module")
def half_scales(llama_run: RunDirectory, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return Exported(llama_run, export(llama_run, tmp_path_factory.mktemp("half") / "out", scale_dtype="f16"))


def test_f16_scales_change_no_weight_and_no_logit(half_scales: Exported, llama_export: Exported) -> None:
    assert_weights_equal(half_scales.run, half_scales.folder)
    assert torch.equal(onnx_logits(half_scales.folder, TOKENS), onnx_logits(llama_export.folder, TOKENS))


def test_f16_scales_take_half_the_bytes_where_they_are_fp16_values(
    half_scales: Exported, llama_export: Exported
) -> None:
    dtypes = {n: str(v.const_value.dtype) for n, v in open_artifact(half_scales.folder).graph.initializers.items()}
    assert dtypes["model.layers.0.attn.qkv_proj.MatMulNBits.scales"] == "FLOAT16"
    assert dtypes["lm_head.MatMulNBits.scales"] == "FLOAT"  # Q6_K: sub-scale times super-scale
    sizes, before = ({n: b for n, _, _, b in read_tensors(e.folder)} for e in (half_scales, llama_export))
    name = "/model/layers.0/attn/qkv_proj/MatMulNBits"
    assert before[name] - sizes[name] == 512 * 8 * 2
    assert sizes["/lm_head/MatMulNBits"] == before["/lm_head/MatMulNBits"]
    sidecar = json.loads((half_scales.folder / "signround_edge.json").read_text())
    assert sidecar["scale_dtype"] == "f16"


def test_f16_scales_of_a_tied_embedding_are_shared_and_load_in_onnxruntime_genai(
    make_random_run: Callable[[PretrainedConfig, str], RunDirectory], tmp_path: Path
) -> None:
    run = make_random_run(Qwen2Config(**BASE, tie_word_embeddings=True), "onnx:w4g32-asym")
    out = export(run, tmp_path / "out", scale_dtype="f16")
    assert_weights_equal(run, out)
    graph = open_artifact(out).graph
    gather = next(node for node in graph if node.op_type == "GatherBlockQuantized")
    assert [n.op_type for n in gather.inputs[2].consumers()].count("MatMulNBits") == 1
    assert generated(out, [5, 6, 7, 8], 12) == expected_tokens(run, [5, 6, 7, 8], 12)


def test_a_run_for_both_formats_exports_its_q4_0_integers_and_k_quant_head(llama_export: Exported) -> None:
    types = {name: kind for name, kind, _, _ in read_tensors(llama_export.folder)}
    assert types["/model/layers.0/attn/qkv_proj/MatMulNBits"] == "MatMulNBits-4x32"
    assert types["/lm_head/MatMulNBits"] == "MatMulNBits-8x16"
    assert types["/model/embed_tokens/GatherBlockQuantized"] == "GatherBlockQuantized-8x16"
    assert_weights_equal(llama_export.run, llama_export.folder)
    kl = mean_kl(torch_logits(llama_export.run, TOKENS), onnx_logits(llama_export.folder, TOKENS))
    assert kl <= 1e-9


def test_onnxruntime_genai_generates_what_torch_generates(llama_export: Exported) -> None:
    import onnxruntime_genai

    assert generated(llama_export.folder, [5, 6, 7, 8], 12) == expected_tokens(llama_export.run, [5, 6, 7, 8], 12)
    model = onnxruntime_genai.Model(str(llama_export.folder))
    text = onnxruntime_genai.Tokenizer(model).encode("the people")
    assert len(text) > 0


def test_provenance_is_in_the_model_and_beside_it(llama_export: Exported) -> None:
    sidecar = json.loads((llama_export.folder / "signround_edge.json").read_text())
    metadata = ir.load(llama_export.folder / "model.onnx").metadata_props
    for key in ("version", "scheme", "manifest_sha256"):
        assert metadata[f"signround_edge.{key}"] == sidecar[key]
    assert sidecar["scheme"] == "gguf:q4_0,onnx:w4g32"
    parameters = {p for tensor in sidecar["tensors"] for p in tensor["parameters"]}
    assert {"model.layers.1.self_attn.k_proj.weight", "lm_head.weight", "model.norm.weight"} <= parameters


def test_exports_are_reproducible_and_replace_an_earlier_one(llama_export: Exported, tmp_path: Path) -> None:
    out = export(llama_export.run, tmp_path / "out", accuracy_level=4)
    levels = [
        n.attributes["accuracy_level"].as_int() for n in ir.load(out / "model.onnx").graph if "NBits" in n.op_type
    ]
    assert set(levels) == {4}
    (out / "mine").touch()
    with pytest.raises(UserError, match=r"an earlier export with other files in it \(mine\)"):
        export(llama_export.run, out)
    (out / "mine").unlink()
    export(llama_export.run, out)
    names = sorted(file.name for file in llama_export.folder.iterdir())
    assert sorted(file.name for file in out.iterdir()) == names
    for name in names:
        assert (out / name).read_bytes() == (llama_export.folder / name).read_bytes(), name
    assert [f.name for f in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("scheme", ["gguf:q4_1", "onnx:w4g32"])
def test_f32_control_of_any_grid_agrees_with_torch(
    scheme: str, make_random_run: Callable[[PretrainedConfig, str], RunDirectory], tmp_path: Path
) -> None:
    run = make_random_run(Qwen2Config(**BASE, tie_word_embeddings=True), scheme)
    out = export(run, tmp_path / "out", dtype="f32")
    assert not open_artifact(out).quantized_nodes()
    assert_weights_equal(run, out)
    assert mean_kl(torch_logits(run, TOKENS), onnx_logits(out, TOKENS)) <= 1e-9


def test_f16_export_stores_halves_and_keeps_the_sliding_window(
    make_random_run: Callable[[PretrainedConfig, str], RunDirectory], tmp_path: Path
) -> None:
    run = make_random_run(MistralConfig(**BASE, sliding_window=16), "onnx:w4g32")
    out = export(run, tmp_path / "out", dtype="f16")
    types = {name: kind for name, kind, _, _ in read_tensors(out)}
    assert types["model.layers.0.mlp.up_proj.MatMul.weight"] == types["model.embed_tokens.weight"] == "F16"
    assert types["model.layers.2.final_norm_layernorm.weight"] == "F32"
    assert_weights_equal(run, out)
    assert mean_kl(torch_logits(run, TOKENS), onnx_logits(out, TOKENS)) <= 1e-5  # weights rounded to f16


def test_the_builder_leaves_no_trace(
    llama_run: RunDirectory, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    lines: list[str] = []
    paths, handlers = list(sys.path), list(logging.getLogger().handlers)
    export(llama_run, tmp_path / "out", log=lines.append)
    assert capfd.readouterr().out == ""
    assert len(lines) >= 3
    assert sys.path == paths
    assert logging.getLogger().handlers == handlers


def test_the_builder_gets_stand_ins_and_no_weights(
    llama_run: RunDirectory, llama_export: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would hold all of them in memory, several times over."""
    build = built.build_graph
    sizes: list[int] = []

    def build_and_weigh(model: nn.Module, row: BuilderClass, config: Path, out: Path, pack_qkv: bool) -> ir.Model:
        graph = build(model, row, config, out, pack_qkv)
        sizes.append(sum(p.untyped_storage().nbytes() for p in model.parameters()))
        arrays = [v.const_value.numpy() for v in graph.graph.initializers.values() if len(v.shape) == 2]
        sizes.append(sum(a.nbytes for a in arrays if 0 not in a.strides and a.shape != (256, 32)))  # but RoPE's tables
        assert not list(out.glob("model*"))
        return graph

    monkeypatch.setattr(built, "build_graph", build_and_weigh)
    out = export(llama_run, tmp_path / "out")
    data = (out / "model.onnx.data").stat().st_size
    assert len(sizes) == 2
    assert max(sizes) < data / 10
    assert data == (llama_export.folder / "model.onnx.data").stat().st_size
    graph = open_artifact(out).graph
    for node in graph:
        if node.op_type == "MatMulNBits":  # the length is that of the run
            rows, blocks, _ = graph.initializers[node.inputs[1].name].const_value.shape.numpy()
            assert node.attributes["N"].as_int() == rows == node.outputs[0].shape[-1]
            assert node.attributes["K"].as_int() == blocks * node.attributes["block_size"].as_int()


def test_importing_the_exporter_is_cheap() -> None:
    code = "import exporters.onnx, sys; sys.exit('torch' in sys.modules or 'onnx_ir' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
