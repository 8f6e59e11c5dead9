"""Mixtures of experts in GGUF: one tensor a matrix with all experts of a layer, in every route of the exporter."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MixtralConfig, Qwen3MoeConfig

from benchmarks.llama_quantize import installed_library, why_unavailable
from benchmarks.llama_quantize import quantize as llama_quantize
from exporters.gguf.container.reader import GgufFile
from exporters.gguf.imatrix.file import read_imatrix, write_imatrix
from exporters.gguf.imatrix.importance import ImatrixSink, ImatrixSource
from exporters.gguf.reader import name_map, read_metadata, read_tensors
from runtime_tests.runtimes.llama_cpp import LlamaCppRuntime
from runtime_tests.verify import verify
from signround_edge.errors import UserError
from signround_edge.inspection import inspect
from signround_edge.run_directory import RunDirectory
from signround_edge.schemes.scheme import parse_scheme
from signround_edge.tuning.quantize import quantize
from signround_edge.tuning.settings import TuningSettings
from tests.exporters.gguf.conftest import export
from tests.exporters.gguf.family_table import FAMILIES
from tests.exporters.gguf.test_gguf_families import kld, torch_logits
from tests.model.test_experts import SIZES
from tests.support import save_random_model

RunOf = Callable[..., RunDirectory]
NAMES = {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"}
EXPERTS = 8
SMALL = {**SIZES, "max_position_embeddings": 512}
MIXTRAL = MixtralConfig(**SMALL, num_local_experts=EXPERTS, bos_token_id=0, eos_token_id=1)
FEW = TuningSettings(steps=0, samples=4, seqlen=32, batch_size=2, compute_dtype="float32")
needs_llama_quantize = pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))


@pytest.fixture
def model(tmp_path: Path, tiny_llama: Path) -> Path:
    return save_random_model(MIXTRAL, tmp_path / "model", tokenizer_from=tiny_llama)


def test_metadata_says_how_many_experts_there_are(run_of: RunOf, tmp_path: Path) -> None:
    metadata = read_metadata(export(run_of(FAMILIES["qwen3_moe"].config), tmp_path / "a.gguf"))
    assert metadata["general.architecture"] == "qwen3moe"
    expected = {
        "expert_count": 16,
        "expert_used_count": 4,
        "expert_feed_forward_length": 96,
        "feed_forward_length": 128,
        "attention.key_length": 32,
    }
    assert {key: metadata.get(f"qwen3moe.{key}") for key in expected} == expected


def test_metadata_of_mixtral(run_of: RunOf, tmp_path: Path) -> None:
    metadata = read_metadata(export(run_of(FAMILIES["mixtral"].config), tmp_path / "a.gguf"))
    expected = {"expert_count": 8, "expert_used_count": 2, "feed_forward_length": 128}
    assert {key: metadata.get(f"llama.{key}") for key in expected} == expected
    assert "llama.expert_feed_forward_length" not in metadata


def test_experts_are_stacked_in_order(run_of: RunOf, tmp_path: Path) -> None:
    run = run_of(FAMILIES["mixtral"].config)
    artifact = export(run, tmp_path / "a.gguf")
    file = GgufFile.open(artifact)
    assert file.tensors["blk.1.ffn_down_exps.weight"].shape == (8, 64, 128)
    assert file.tensors["blk.1.ffn_gate_inp.weight"].ggml_type.name == "F32"
    stored = {t.name: t.weights for t in LlamaCppRuntime().stored_tensors(artifact)}
    for name, matrix in NAMES.items():
        for expert in range(8):
            ours = run.dequantized(f"model.layers.1.mlp.experts.{expert}.{matrix}.weight").numpy()
            theirs = stored[f"blk.1.{name}.weight"].reshape(8, *ours.shape)[expert]
            assert np.array_equal(ours, theirs), (name, expert)
    places = [m.gguf_name for m in name_map(run, artifact)]
    assert len(places) == len(run.names())
    assert places.count("blk.0.ffn_up_exps.weight") == 8
    shapes = {tensor.name: tensor.shape for tensor in inspect(artifact).tensors}
    assert shapes["blk.0.ffn_up_exps.weight"] == (8, 128, 64)


@pytest.mark.parametrize("kind", [pytest.param("mixtral", marks=pytest.mark.full), "qwen3_moe"])
def test_a_run_of_the_tuner_is_exact_and_computes_what_torch_computes(
    kind: str, tmp_path: Path, tiny_llama: Path, calibration_text: Path, evaluation_text: Path
) -> None:
    config = MIXTRAL
    if kind == "qwen3_moe":
        few = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 64, "norm_topk_prob": True}
        config = Qwen3MoeConfig(**SMALL, **few, head_dim=32, bos_token_id=0, eos_token_id=1)
    model = save_random_model(config, tmp_path / "model", tokenizer_from=tiny_llama)
    settings = replace(FEW, steps=4)
    run = quantize(model, parse_scheme("gguf:q4_1"), tmp_path / "run", str(calibration_text), settings)
    artifact = export(run, tmp_path / "a.gguf")
    tokens = np.random.default_rng(0).integers(0, 3072, 150).astype(np.int32)
    with LlamaCppRuntime().open(export(run, tmp_path / "f32.gguf", dtype="f32")) as session:
        assert kld(torch_logits(run, tokens), session.logits(tokens)) <= 1e-5
    report = verify(run, [artifact], evaluation_text, n_ctx=64, max_windows=3, reference=model)
    assert report.to_json()["weights_exact"] is True
    assert report.passed, report.to_json()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_plans_bytes_are_the_files_also_for_half_floats(
    dtype: torch.dtype, model: Path, tmp_path: Path, calibration_text: Path
) -> None:
    file = model / "model.safetensors"
    save_file({name: t.to(dtype) for name, t in load_file(file).items()}, file, metadata={"format": "pt"})
    run = quantize(model, parse_scheme("gguf:q4_0"), tmp_path / "run", str(calibration_text), FEW)
    artifact = export(run, tmp_path / "a.gguf")
    assert inspect(run.path).total_bytes == inspect(artifact).total_bytes
    types = {row.name: row.type for row in read_tensors(artifact)}
    assert types["blk.0.ffn_gate_inp.weight"] == "F32"


def test_our_own_f16_export_as_template(run_of: RunOf, byte_level_folder: Path, tmp_path: Path) -> None:
    run = run_of(FAMILIES["mixtral"].config, tokenizer=byte_level_folder)
    template = export(run, tmp_path / "f16.gguf", dtype="f16")
    direct, through = (
        export(run, tmp_path / "direct.gguf"),
        export(run, tmp_path / "through.gguf", template=template),
    )
    assert read_tensors(through) == read_tensors(direct)
    one, other = GgufFile.open(direct), GgufFile.open(through)
    assert all(np.array_equal(one.raw(name), other.raw(name)) for name in one.tensors)


def test_a_template_with_its_experts_in_another_order_is_refused(
    run_of: RunOf, byte_level_folder: Path, tmp_path: Path
) -> None:
    run = run_of(FAMILIES["mixtral"].config, tokenizer=byte_level_folder)
    template = export(run, tmp_path / "f32.gguf", dtype="f32")
    info = GgufFile.open(template).tensors["blk.1.ffn_up_exps.weight"]
    data = bytearray(template.read_bytes())
    size = info.nbytes // 8
    one = slice(info.offset + 2 * size, info.offset + 3 * size)
    other = slice(info.offset + 5 * size, info.offset + 6 * size)
    data[one], data[other] = data[other], data[one]
    template.write_bytes(data)
    with pytest.raises(UserError, match=r"no place for 8 .*experts\.0\.up_proj"):
        export(run, tmp_path / "a.gguf", template=template)


def saved_imatrix(model: Path, folder: Path, calibration: Path) -> tuple[RunDirectory, Path]:
    file = folder / "imatrix.gguf"
    sink = ImatrixSink(file, model, "text")
    run = quantize(model, parse_scheme("gguf:q4_0"), folder / "own", str(calibration), FEW, save_imatrix=sink)
    return run, file


def same_codes(one: RunDirectory, other: RunDirectory) -> set[bool]:
    names = [name for name in one.names() if one.is_quantized(name)]
    return {torch.equal(one.quantized(name).codes, other.quantized(name).codes) for name in names}


def test_importance_is_one_row_an_expert_and_gives_the_same_run(
    model: Path, tmp_path: Path, calibration_text: Path
) -> None:
    own, file = saved_imatrix(model, tmp_path, calibration_text)
    vectors = read_imatrix(file)
    assert vectors["blk.1.ffn_down_exps.weight"].shape == (EXPERTS, 96)
    assert vectors["blk.1.ffn_gate_exps.weight"].shape == (EXPERTS, 64)
    assert len(np.unique(vectors["blk.1.ffn_up_exps.weight"], axis=0)) == EXPERTS
    source = ImatrixSource(file, model)
    found = source.of("model.layers.1.mlp.experts.5.down_proj.weight", 96)
    assert found is not None
    assert np.array_equal(found.numpy(), vectors["blk.1.ffn_down_exps.weight"][5])
    given = quantize(model, parse_scheme("gguf:q4_0"), tmp_path / "g", str(calibration_text), FEW, imatrix=source)
    assert same_codes(own, given) == {True}


def test_the_older_form_has_experts_end_to_end(model: Path, tmp_path: Path) -> None:
    values = np.arange(1, EXPERTS * 96 + 1, dtype=np.float32)
    name = b"blk.0.ffn_down_exps.weight"
    data = struct.pack("<ii", 1, len(name)) + name + struct.pack("<ii", 2, values.size) + (2 * values).tobytes()
    (tmp_path / "imatrix.dat").write_bytes(data)
    source = ImatrixSource(tmp_path / "imatrix.dat", model)
    found = source.of("model.layers.0.mlp.experts.3.down_proj.weight", 96)
    assert found is not None
    assert found.tolist() == values[3 * 96 : 4 * 96].tolist()


def test_importance_for_another_number_of_experts_is_refused(model: Path, tmp_path: Path) -> None:
    vectors = {"blk.0.ffn_down_exps.weight": np.ones((EXPERTS + 1, 96), dtype=np.float32)}
    file = write_imatrix(tmp_path / "imatrix.gguf", vectors, 100, 10, ["text"])
    with pytest.raises(UserError, match=r"ffn_down_exps\.weight has 9 × 96 values"):
        ImatrixSource(file, model).of("model.layers.0.mlp.experts.3.down_proj.weight", 96)


@needs_llama_quantize
def test_llama_quantize_takes_our_importance(model: Path, tmp_path: Path, calibration_text: Path) -> None:
    run, file = saved_imatrix(model, tmp_path, calibration_text)
    script = Path(__file__).parents[2] / "benchmarks" / "llama_imatrix_loader.py"
    common = installed_library().parent / "libllama-common.so"
    command = [sys.executable, str(script), str(common), str(file)]
    document = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert document["accepted"]
    entry = document["entries"]["blk.0.ffn_up_exps.weight"]
    assert entry["counts"] == [4 * 32] * EXPERTS
    vectors = read_imatrix(file)
    loaded = np.float32(entry["sums"]).reshape(EXPERTS, -1) / np.float32(4 * 32)
    np.testing.assert_allclose(loaded, vectors["blk.0.ffn_up_exps.weight"], rtol=2**-22)
    floats = export(run, tmp_path / "f32.gguf", dtype="f32")
    for name, importance in (("weighted", vectors), ("plain", None)):
        llama_quantize(floats, tmp_path / f"{name}.gguf", "Q4_0", importance)
    weighted, plain = (GgufFile.open(tmp_path / f"{name}.gguf") for name in ("weighted", "plain"))
    assert weighted.tensors["blk.0.ffn_up_exps.weight"].ggml_type.name == "Q4_0"
    assert not np.array_equal(weighted.raw("blk.0.ffn_up_exps.weight"), plain.raw("blk.0.ffn_up_exps.weight"))


def test_gguf_py_reads_the_stacked_tensor(run_of: RunOf, tmp_path: Path) -> None:
    artifact = export(run_of(FAMILIES["qwen3_moe"].config), tmp_path / "a.gguf")
    (tensor,) = [t for t in gguf.GGUFReader(artifact).tensors if t.name == "blk.0.ffn_down_exps.weight"]
    assert tensor.shape.tolist() == [96, 64, 16]
