"""Files of the built-in families load in llama.cpp and compute what transformers computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from exporters.gguf.families import interleaved_rows
from exporters.gguf.metadata import rope_frequency_factors, sliding_window
from exporters.gguf.reader import iter_expected, name_map, read_metadata, read_tensors
from runtime_tests.runtimes.llama_cpp import LlamaCppRuntime
from signround_edge import __version__
from signround_edge.errors import UserError
from signround_edge.metrics import ScoreKeeper
from signround_edge.run_directory import RunDirectory, sha256_of
from tests.exporters.gguf.conftest import BASE, export
from tests.support import dequantized_model

RunOf = Callable[..., RunDirectory]

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 1024}

CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**BASE),
    "llama_tied_with_biases": LlamaConfig(**BASE, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "llama_wide_heads": LlamaConfig(**BASE, head_dim=128),
    "llama3_rope": LlamaConfig(**BASE, rope_parameters=LLAMA3_ROPE),
    "llama_linear_rope": LlamaConfig(**BASE, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}),
    "mistral": MistralConfig(**BASE, sliding_window=None),
    "qwen2": Qwen2Config(**BASE),
    "qwen2_yarn": Qwen2Config(**BASE, rope_parameters=YARN),
    "qwen2_yarn_attention": Qwen2Config(**BASE, rope_parameters={**YARN, "attention_factor": 1.3}),
    "qwen3": Qwen3Config(**BASE, head_dim=128),
}


def kld(reference: np.ndarray, logits: np.ndarray) -> float:
    keeper = ScoreKeeper()
    keeper.add(logits, np.zeros(len(logits), dtype=np.int32), reference)
    mean = keeper.scores().kld_mean
    assert mean is not None
    return mean


def torch_logits(run: RunDirectory, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return dequantized_model(run)(torch.from_numpy(tokens)[None].long()).logits[0].numpy()


@pytest.mark.parametrize("name", CONFIGS)
def test_f32_export_computes_what_transformers_computes(name: str, run_of: RunOf, tmp_path: Path) -> None:
    run = run_of(CONFIGS[name])
    tokens = np.random.default_rng(0).integers(0, BASE["vocab_size"], 150).astype(np.int32)
    with LlamaCppRuntime().open(export(run, tmp_path / "f32.gguf", dtype="f32")) as session:
        logits = session.logits(tokens)
    assert kld(torch_logits(run, tokens), logits) <= 1e-5


@pytest.mark.parametrize(
    ("name", "scheme"),
    [(name, "gguf:q4_0") for name in ("llama", "mistral", "qwen2", "qwen3")]
    + [("llama", scheme) for scheme in ("gguf:q4_1", "gguf:q5_0", "gguf:q5_1", "gguf:q8_0", "onnx:w4g32")],
)
def test_llama_cpp_dequantizes_the_runs_own_weights(name: str, scheme: str, run_of: RunOf, tmp_path: Path) -> None:
    run = run_of(CONFIGS[name], scheme)
    artifact = export(run, tmp_path / "packed.gguf")
    expected = {tensor.gguf_name: tensor.weights() for tensor in iter_expected(run, artifact)}
    assert len(expected) == len(run.names())
    for stored in LlamaCppRuntime().stored_tensors(artifact):
        assert np.array_equal(stored.weights.view(np.uint32), expected.pop(stored.name).view(np.uint32)), stored.name
    assert not expected


@pytest.mark.parametrize("name", ["llama_tied_with_biases", "qwen3"])
def test_packed_file_runs(name: str, run_of: RunOf, tmp_path: Path) -> None:
    run = run_of(CONFIGS[name])
    tokens = np.random.default_rng(0).integers(0, BASE["vocab_size"], 100).astype(np.int32)
    with LlamaCppRuntime().open(export(run, tmp_path / "packed.gguf")) as session:
        logits = session.logits(tokens)
    # llama.cpp rounds activations to 8 bits here; a wrong graph or order of rows gives more than 0.1.
    assert kld(torch_logits(run, tokens), logits) <= 2e-2


def test_f16_export_holds_the_weights_rounded_to_f16(run_of: RunOf, tmp_path: Path) -> None:
    run = run_of(CONFIGS["llama"])
    artifact = export(run, tmp_path / "f16.gguf", dtype="f16")
    types = {row.name: row.type for row in read_tensors(artifact)}
    assert types["blk.0.ffn_up.weight"] == types["token_embd.weight"] == "F16"
    assert types["blk.0.attn_norm.weight"] == types["output_norm.weight"] == "F32"
    expected = {tensor.gguf_name: tensor.weights() for tensor in iter_expected(run, artifact)}
    for stored in LlamaCppRuntime().stored_tensors(artifact):
        assert np.array_equal(stored.weights, expected[stored.name]), stored.name


def test_tied_embeddings_are_written_once(run_of: RunOf, tmp_path: Path) -> None:
    run = run_of(CONFIGS["llama_tied_with_biases"])
    names = [row.name for row in read_tensors(export(run, tmp_path / "a.gguf"))]
    assert "output.weight" not in names
    assert [row.type for row in read_tensors(tmp_path / "a.gguf") if row.name == "token_embd.weight"] == ["Q6_K"]


def test_rows_of_q_and_k_are_interleaved_for_llama_only(run_of: RunOf, tmp_path: Path) -> None:
    run = run_of(CONFIGS["llama"])
    orders = {m.gguf_name: m.rows for m in name_map(run, export(run, tmp_path / "a.gguf"))}
    assert orders["blk.1.attn_q.weight"].tolist() == interleaved_rows(256, 4).tolist()
    assert orders["blk.1.attn_k.weight"].tolist() == interleaved_rows(128, 2).tolist()
    assert orders["blk.1.attn_v.weight"] is None
    assert interleaved_rows(8, 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_metadata_says_what_the_model_is_and_where_it_comes_from(run_of: RunOf, tmp_path: Path) -> None:
    run = run_of(CONFIGS["qwen3"])
    metadata = read_metadata(export(run, tmp_path / "a.gguf"))
    expected = {
        "general.architecture": "qwen3",
        "general.file_type": 2,
        "general.quantization_version": 2,
        "qwen3.block_count": 2,
        "qwen3.context_length": 4096,
        "qwen3.embedding_length": 256,
        "qwen3.feed_forward_length": 512,
        "qwen3.attention.head_count": 4,
        "qwen3.attention.head_count_kv": 2,
        "qwen3.attention.key_length": 128,
        "qwen3.attention.value_length": 128,
        "qwen3.vocab_size": 600,
        "signround_edge.version": __version__,
        "signround_edge.scheme": "gguf:q4_0",
        "signround_edge.manifest_sha256": sha256_of(run.path / "manifest.json"),
    }
    assert {key: metadata.get(key) for key in expected} == expected
    assert metadata["qwen3.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)


def test_old_spelling_of_rope_settings_means_the_same() -> None:
    old = {**BASE, "rope_theta": 500000.0, "rope_scaling": {k: v for k, v in LLAMA3_ROPE.items() if k != "rope_theta"}}
    new = {**BASE, "rope_parameters": LLAMA3_ROPE}
    ours, theirs = rope_frequency_factors(old), rope_frequency_factors(new)
    assert ours is not None
    assert np.array_equal(ours, theirs)
    assert ours[0] == 1.0
    assert ours[-1] == 8.0
    assert rope_frequency_factors({**BASE, "rope_theta": 1e4}) is None


@pytest.mark.parametrize(
    ("config", "window"),
    [
        ({"model_type": "mistral", "sliding_window": 64}, 64),
        ({"model_type": "mistral", "sliding_window": None}, None),
        ({"model_type": "mistral", "sliding_window": 4096}, None),  # as long as the context: no window at all
        ({"model_type": "qwen2", "sliding_window": 64, "use_sliding_window": False}, None),
        ({"model_type": "qwen2", "sliding_window": 64, "use_sliding_window": True}, 64),
    ],
)
def test_sliding_window_counts_only_where_the_model_uses_it(config: dict[str, object], window: int | None) -> None:
    assert sliding_window({**BASE, **config}) == window


def test_a_sliding_window_is_written_and_said_aloud(run_of: RunOf, tmp_path: Path) -> None:
    lines: list[str] = []
    artifact = export(run_of(MistralConfig(**BASE, sliding_window=64)), tmp_path / "a.gguf", log=lines.append)
    assert read_metadata(artifact)["llama.attention.sliding_window"] == 64
    assert any("sliding window of 64" in line for line in lines)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LlamaConfig(**BASE, hidden_act="gelu"), "gelu.*--template"),
        (Qwen3Config(**BASE, head_dim=64, attention_bias=True), r"o_proj\.bias.*--template"),
        (
            LlamaConfig(
                **BASE,
                rope_parameters={
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "factor": 4.0,
                    "short_factor": [1.0] * 32,
                    "long_factor": [2.0] * 32,
                    "original_max_position_embeddings": 1024,
                },
            ),
            "longrope.*--template",
        ),
    ],
)
def test_what_llama_cpp_cannot_compute_is_refused(
    config: PretrainedConfig, message: str, run_of: RunOf, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        export(run_of(config), tmp_path / "a.gguf")
    assert not list(tmp_path.glob("a.gguf*"))


def test_a_grid_without_gguf_type_is_refused_but_exports_as_floats(run_of: RunOf, tmp_path: Path) -> None:
    run = run_of(CONFIGS["llama"], "onnx:w4g128-asym")
    with pytest.raises(UserError, match=r"w4g128-asym, which GGUF cannot store.*--dtype f16"):
        export(run, tmp_path / "a.gguf")
    assert read_tensors(export(run, tmp_path / "f16.gguf", dtype="f16"))


def test_a_folder_as_target_gets_model_gguf(run_of: RunOf, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert export(run_of(CONFIGS["llama"]), tmp_path / "out") == tmp_path / "out" / "model.gguf"


def test_the_same_run_gives_the_same_bytes(run_of: RunOf, tmp_path: Path) -> None:
    run = run_of(CONFIGS["qwen2"])
    assert sha256_of(export(run, tmp_path / "a.gguf")) == sha256_of(export(run, tmp_path / "b.gguf"))
