"""Every class of onnxruntime-genai's builder that transformers has a text model for: its graph is theirs, cached."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from transformers import PretrainedConfig

from exporters.onnx import export as export_module
from exporters.onnx.artifact.comparison import CachedGraph
from exporters.onnx.artifact.sidecar import Sidecar
from exporters.onnx.builder_classes import BUILDER_CLASSES, BuilderClass
from runtime_tests.worker.onnxruntime_engine import OnnxEngine
from signround_edge.errors import UserError
from signround_edge.run_directory import RunDirectory
from tests.exporters.onnx.conftest import Exported, export
from tests.exporters.onnx.test_onnx_export import assert_weights_equal, expected_tokens, generated, mean_kl
from tests.support import dequantized_model

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 600,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
HEADS = {**SMALL, "head_dim": 32}
TYPES = ["sliding_attention", "full_attention"]
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0 + i / 4 for i in range(8)],
    "original_max_position_embeddings": 64,
}
LINEAR_ATTENTION = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "head_dim": 64,
}

QUICK: dict[str, PretrainedConfig] = {
    "llama-yarn": transformers.LlamaConfig(**HEADS, rope_parameters=YARN),
    "gemma-3": transformers.Gemma3TextConfig(
        **HEADS, layer_types=TYPES, sliding_window=16, query_pre_attn_scalar=32, final_logit_softcapping=5.0
    ),
    "gemma-4": transformers.Gemma4TextConfig(
        **{**HEADS, "hidden_size_per_layer_input": 0},
        layer_types=TYPES,
        sliding_window=16,
        global_head_dim=64,
        attention_k_eq_v=True,
        num_global_key_value_heads=1,
    ),
    "smollm-3": transformers.SmolLM3Config(**SMALL, no_rope_layers=[1, 0]),
    "phi-3": transformers.Phi3Config(**SMALL, sliding_window=16),
    "phi-3.5": transformers.Phi3Config(**SMALL, rope_parameters=LONG),
    "lfm-2": transformers.Lfm2Config(
        **SMALL, layer_types=["conv", "full_attention"], block_multiple_of=32, block_auto_adjust_ff_dim=True
    ),
    "qwen-3.5": transformers.Qwen3_5TextConfig(**SMALL, **LINEAR_ATTENTION),
}
ALIKE = ("phi-3", "gemma-3")  # Phi-3.5 and Gemma 4 are built by the same code and more of it
full = pytest.mark.full
FULL: dict[str, PretrainedConfig] = {
    "ernie-4.5": transformers.Ernie4_5Config(**HEADS),
    "gemma": transformers.GemmaConfig(**HEADS),
    "gemma-2": transformers.Gemma2Config(
        **HEADS, sliding_window=16, attn_logit_softcapping=10.0, final_logit_softcapping=5.0, query_pre_attn_scalar=24
    ),
    "granite": transformers.GraniteConfig(
        **SMALL,
        embedding_multiplier=3.0,
        attention_multiplier=0.1,
        logits_scaling=2.0,
        residual_multiplier=0.5,
    ),
    "granite-4": transformers.GraniteMoeHybridConfig(
        **SMALL,
        layer_types=["attention", "attention"],
        shared_intermediate_size=96,
        num_local_experts=0,
        position_embedding_type="rope",
        embedding_multiplier=3.0,
        attention_multiplier=0.1,
        logits_scaling=2.0,
        residual_multiplier=0.5,
    ),
    "hunyuan": transformers.HunYuanDenseV1Config(**HEADS),
    "llama-linear": transformers.LlamaConfig(
        **HEADS, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    ),
    "ministral": transformers.MinistralConfig(**HEADS, layer_types=TYPES, sliding_window=16),
    "nemotron": transformers.NemotronConfig(**HEADS, partial_rotary_factor=0.5),
    "olmo": transformers.OlmoConfig(**SMALL),
    "phi": transformers.PhiConfig(**{**SMALL, "hidden_size": 128}, partial_rotary_factor=0.5),
    "phi-4-mini": transformers.Phi3Config(
        **{**SMALL, "hidden_size": 128},
        tie_word_embeddings=True,
        partial_rotary_factor=0.5,
        rope_parameters={**LONG, "partial_rotary_factor": 0.5, "original_max_position_embeddings": 32},
    ),
    "qwen-2-yarn": transformers.Qwen2Config(**SMALL, rope_parameters=YARN),
    "qwen-3.5-more-keys": transformers.Qwen3_5TextConfig(
        **SMALL, **{**LINEAR_ATTENTION, "linear_num_value_heads": 2}, tie_word_embeddings=True
    ),
}


def trace(*arguments: object) -> None:
    """In the place of the other route, which takes long."""
    raise UserError("traced")


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=() if name in QUICK and name not in ALIKE else full) for name in QUICK | FULL],
    name="built",
)
def _built(
    request: pytest.FixtureRequest,
    make_random_run: Callable[[PretrainedConfig, str], RunDirectory],
    tmp_path_factory: pytest.TempPathFactory,
) -> Exported:
    run = make_random_run((QUICK | FULL)[request.param], "onnx:w4g32")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export_module, "trace", trace)
        return Exported(run, export(run, tmp_path_factory.mktemp("built") / "out"))


def test_the_builders_graph_has_a_cache_and_every_weight_of_the_run(built: Exported) -> None:
    sidecar = Sidecar.read(built.folder)
    assert sidecar.kv_cache
    assert sidecar.provenance["graph_builder"].startswith("onnxruntime-genai")
    assert_weights_equal(built.run, built.folder)


def test_logits_of_a_batch_and_of_twenty_cached_tokens_are_those_of_transformers(built: Exported) -> None:
    tokens = np.random.default_rng(1).integers(3, 600, (2, 60))
    with torch.no_grad():
        reference = dequantized_model(built.run)(torch.from_numpy(tokens), use_cache=False).logits.float()
    assert reference.std() > 0.1
    graph = CachedGraph(built.folder / "model.onnx")
    parts = [graph.append(tokens[:, :40]), *(graph.append(tokens[:, i : i + 1]) for i in range(40, 60))]
    logits = torch.from_numpy(np.concatenate(parts, axis=1))
    assert mean_kl(reference[:, :40], logits[:, :40]) <= 1e-9  # the issue asks for 1e-6
    assert mean_kl(reference[:, 40:], logits[:, 40:]) <= 1e-9
    of_verify = OnnxEngine(built.folder).logits(tokens[0].astype(np.int32))
    assert mean_kl(reference[0], torch.from_numpy(of_verify)) <= 1e-9


def test_onnxruntime_genai_generates_what_transformers_does(built: Exported) -> None:
    assert generated(built.folder, [5, 6, 7, 8], 24) == expected_tokens(built.run, [5, 6, 7, 8], 24)


def test_a_parameter_that_the_graph_cuts_is_named_with_its_rows(
    make_random_run: Callable[[PretrainedConfig, str], RunDirectory], tmp_path: Path
) -> None:
    folder = export(make_random_run(QUICK["phi-3"], "onnx:w4g32"), tmp_path / "out")
    tensors = json.loads((folder / "signround_edge.json").read_text())["tensors"]
    rows = {t["name"]: t.get("rows") for t in tensors if t["parameters"] == ["model.layers.0.mlp.gate_up_proj.weight"]}
    assert rows == {
        "/model/layers.0/mlp/gate_proj/MatMulNBits": [[0, 128]],
        "/model/layers.0/mlp/up_proj/MatMulNBits": [[128, 256]],
    }


def test_a_graph_that_is_not_what_transformers_computes_is_traced_instead(
    make_random_run: Callable[[PretrainedConfig, str], RunDirectory], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without its change of the config, the builder lets Mistral attend to everything."""

    monkeypatch.setitem(BUILDER_CLASSES, "MistralForCausalLM", BuilderClass())
    monkeypatch.setattr(export_module, "trace", trace)
    lines: list[str] = []
    run = make_random_run(transformers.MistralConfig(**HEADS, sliding_window=8), "onnx:w4g32")
    with pytest.raises(UserError, match="traced"):
        export(run, tmp_path / "out", log=lines.append)
    assert any("its logits differ from those of transformers: KL divergence" in line for line in lines)


def test_a_config_that_names_no_architecture_is_known_by_its_model_type(
    llama_run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_module, "trace", trace)
    config = shutil.copytree(llama_run.path, tmp_path / "run") / "config" / "config.json"
    settings = json.loads(config.read_text())
    del settings["architectures"]
    config.write_text(json.dumps(settings))
    run = RunDirectory.open(tmp_path / "run")
    assert_weights_equal(run, export(run, tmp_path / "out"))
