"""`--io-dtype f16`: the same codes and scales in a graph that computes in f16, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from transformers import (
    GraniteConfig,
    LlamaConfig,
    Mamba2Config,
    Olmo2Config,
    Phi3Config,
    PretrainedConfig,
    Qwen3_5TextConfig,
)

from exporters.onnx.artifact.comparison import CachedGraph
from exporters.onnx.artifact.reader import open_artifact
from exporters.onnx.options import OnnxOptions
from runtime_tests.verify import verify
from signround_edge.errors import UserError
from signround_edge.run_directory import RunDirectory
from tests.exporters.onnx.conftest import BASE, export
from tests.exporters.onnx.test_onnx_export import assert_weights_equal, generated, mean_kl
from tests.support import dequantized_model

MakeRun = Callable[..., RunDirectory]


@pytest.fixture(scope="module")
def run(make_random_run: MakeRun) -> RunDirectory:
    """A tied Llama whose scales are all f16 values."""
    return make_random_run(LlamaConfig(**BASE, tie_word_embeddings=True), "onnx:w4g32")


@pytest.fixture(scope="module")
def half(run: RunDirectory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its export in f16."""
    return export(run, tmp_path_factory.mktemp("half") / "out", io_dtype="f16")


def test_codes_and_scales_are_the_runs_and_nothing_is_f32(run: RunDirectory, half: Path) -> None:
    assert_weights_equal(run, half)
    graph = open_artifact(half).graph
    assert {value.dtype for value in graph.inputs} == {ir.DataType.INT64, ir.DataType.FLOAT16}
    assert {value.dtype for value in graph.outputs} == {ir.DataType.FLOAT16}
    assert not [name for name, value in graph.initializers.items() if value.const_value.dtype == ir.DataType.FLOAT]
    casts = [node for node in graph if node.op_type == "Cast"]
    assert ir.DataType.FLOAT.value not in [node.attributes["to"].as_int() for node in casts]


def test_logits_are_near_those_of_transformers_with_the_cache_too(run: RunDirectory, half: Path) -> None:
    tokens = np.random.default_rng(1).integers(3, 600, (2, 40))
    with torch.no_grad():
        reference = dequantized_model(run)(torch.from_numpy(tokens), use_cache=False).logits.float()
    graph = CachedGraph(half / "model.onnx")
    parts = [graph.append(tokens[:, :32]), *(graph.append(tokens[:, i : i + 1]) for i in range(32, 40))]
    kl = mean_kl(reference, torch.from_numpy(np.concatenate(parts, axis=1)))
    assert 0 < kl <= 1e-5


def test_long_rope_chooses_one_of_two_tables_in_f16(make_random_run: MakeRun, tmp_path: Path) -> None:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 32}
    rope |= {"short_factor": [1.0] * 32, "long_factor": [2.0 + i / 16 for i in range(32)]}
    run = make_random_run(Phi3Config(**BASE, rope_parameters=rope), "onnx:w4g32")
    folder = export(run, tmp_path / "out", io_dtype="f16")
    for length in (24, 48):
        tokens = np.random.default_rng(1).integers(3, 600, (1, length))
        with torch.no_grad():
            reference = dequantized_model(run)(torch.from_numpy(tokens), use_cache=False).logits.float()
        assert mean_kl(reference, torch.from_numpy(CachedGraph(folder / "model.onnx").append(tokens))) <= 1e-5


def test_onnxruntime_genai_generates_from_it(half: Path) -> None:
    assert len(generated(half, [5, 6, 7, 8], 12)) == 12


def test_verify_judges_it_as_what_rounds_activations(tiny_llama_run: RunDirectory, tmp_path: Path) -> None:
    from signround_edge.demo import evaluation_text_path

    folder = export(tiny_llama_run, tmp_path / "out", io_dtype="f16")
    report = verify(tiny_llama_run, [folder], evaluation_text_path(), n_ctx=64, max_windows=1)
    assert report.passed
    assert [runtime.gate for runtime in report.runtimes] == ["quantized"]


@pytest.fixture(scope="module")
def tiny_llama_run(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    from tests.support import make_run

    return make_run(tiny_llama, tmp_path_factory.mktemp("tiny") / "run", "onnx:w4g32")


def refusal(run: RunDirectory, out: Path) -> str:
    with pytest.raises(UserError) as caught:
        export(run, out, io_dtype="f16")
    assert not out.exists()
    return str(caught.value)


def test_activations_that_overflow_are_found(make_random_run: MakeRun, tmp_path: Path) -> None:
    wild = make_random_run(GraniteConfig(**{**BASE, "initializer_range": 1.0}, embedding_multiplier=6e4), "onnx:w4g32")
    assert "activations overflow in f16" in refusal(wild, tmp_path / "out")


def test_scales_that_are_no_f16_values_are_not_rounded(llama_run: RunDirectory, tmp_path: Path) -> None:
    """Those of a Q6_K embedding and head: what reads them computes in f32."""
    folder = export(llama_run, tmp_path / "out", io_dtype="f16")
    assert_weights_equal(llama_run, folder)
    stored = open_artifact(folder).graph.initializers
    in_floats = {name for name, value in stored.items() if value.const_value.dtype == ir.DataType.FLOAT}
    assert in_floats == {"lm_head.MatMulNBits.scales"}
    assert len(generated(folder, [5, 6, 7, 8], 12)) == 12


def test_a_traced_graph_keeps_angles_and_sums_of_squares_in_f32(make_random_run: MakeRun, tmp_path: Path) -> None:
    """Its norms and rotation are nodes of their own; positions beyond 2,048 are none that f16 can count."""
    run = make_random_run(Olmo2Config(**{**BASE, "num_hidden_layers": 1}), "onnx:w4g32")
    folder = export(run, tmp_path / "out", io_dtype="f16")
    assert_weights_equal(run, folder)
    graph = open_artifact(folder).graph
    assert {value.dtype for value in [*graph.inputs, *graph.outputs]} == {ir.DataType.INT64, ir.DataType.FLOAT16}
    assert {node.inputs[0].dtype for node in graph if node.op_type in ("Cos", "Pow")} == {ir.DataType.FLOAT}
    tokens = np.random.default_rng(1).integers(3, 600, (1, 2100))
    with torch.no_grad():
        reference = dequantized_model(run)(torch.from_numpy(tokens), use_cache=False).logits.float()
    cached = CachedGraph(folder / "model.onnx")
    logits = np.concatenate([cached.append(tokens[:, :2092]), cached.append(tokens[:, 2092:])], axis=1)
    assert 0 < mean_kl(reference[:, 2048:], torch.from_numpy(logits[:, 2048:])) <= 1e-5
    assert len(generated(folder, [5, 6, 7, 8], 12)) == 12


@pytest.mark.parametrize(
    "config",
    [
        Qwen3_5TextConfig(
            **BASE,
            layer_types=["linear_attention", "full_attention"],
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=32,
            linear_value_head_dim=32,
        ),
        pytest.param(
            Mamba2Config(
                hidden_size=64, num_hidden_layers=1, num_heads=8, head_dim=16, state_size=16, n_groups=1, vocab_size=600
            ),
            marks=pytest.mark.full,
        ),
    ],
    ids=["builder's", "traced"],
)
def test_recurrent_states_are_refused(config: PretrainedConfig, make_random_run: MakeRun, tmp_path: Path) -> None:
    run = make_random_run(config, "onnx:w4g32")
    assert "keep sums over the whole text" in refusal(run, tmp_path / "out")


@pytest.mark.parametrize(
    ("other", "name"),
    [
        ({"operators": "qdq"}, "--operators qdq"),
        ({"accuracy_level": 4}, "--accuracy-level 4"),
        ({"dtype": "f16"}, "--dtype"),
    ],
)
def test_options_that_do_not_go_with_it(other: dict[str, object], name: str) -> None:
    with pytest.raises(UserError, match=f"--io-dtype f16 does not go with {name}"):
        OnnxOptions(io_dtype="f16", **other)  # type: ignore[arg-type]
