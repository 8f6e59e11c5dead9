"""config.json of published models, in all its spellings, says what llama.cpp has to be told."""

from __future__ import annotations

import numpy as np
import pytest

from exporters.gguf.families.rope import rope_frequency_factors, rope_parameters, rotary_dims
from exporters.gguf.families.table import canonical_config, family_of
from exporters.gguf.families.windows import full_attention_period, window_period
from tests.exporters.gguf.conftest import BASE
from tests.exporters.gguf.family_settings import LLAMA3_ROPE

# As config.json of the published models spells it (abridged), and what that means.
PUBLISHED = {
    "tiiuae/falcon-7b": (
        {"model_type": "falcon", "hidden_size": 4544, "num_attention_heads": 71, "multi_query": True},
        {"num_key_value_heads": 1, "head_dim": 64, "intermediate_size": 18176, "max_position_embeddings": 2048},
    ),
    "tiiuae/falcon-40b": (
        {
            "model_type": "falcon",
            "hidden_size": 8192,
            "num_attention_heads": 128,
            "num_kv_heads": 8,
            "new_decoder_architecture": True,
        },
        {"num_key_value_heads": 8, "head_dim": 64},
    ),
    "bigscience/bloom-560m": (
        {"model_type": "bloom", "n_embed": 1024, "n_layer": 24, "num_attention_heads": 16, "seq_length": 2048},
        {"hidden_size": 1024, "num_hidden_layers": 24, "num_key_value_heads": 16, "max_position_embeddings": 2048},
    ),
    "openai-community/gpt2": (
        {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "n_ctx": 1024, "n_positions": 1024},
        {"hidden_size": 768, "intermediate_size": 3072, "max_position_embeddings": 1024, "hidden_act": "gelu_new"},
    ),
    "EleutherAI/pythia-70m": (
        {"model_type": "gpt_neox", "hidden_size": 512, "num_attention_heads": 8, "rotary_pct": 0.25},
        {"head_dim": 64, "rotary_dims": 16},
    ),
    "google/gemma-3-1b-it": (
        {
            "model_type": "gemma3_text",
            "num_hidden_layers": 26,
            "rope_local_base_freq": 10000,
            "rope_theta": 1000000,
            "sliding_window": 512,
            "sliding_window_pattern": 6,
        },
        {"window_period": 6, "rope_theta": 1e6, "sliding_window": 512},
    ),
    "google/gemma-4-26B-A4B-it": (
        {
            "model_type": "gemma4_text",
            "attention_k_eq_v": True,
            "enable_moe_block": True,
            "top_k_experts": 8,
            "global_head_dim": 512,
            "head_dim": 256,
            "num_global_key_value_heads": 2,
            "num_hidden_layers": 30,
            "num_key_value_heads": 8,
        },
        {
            "head_dim": 512,
            "head_dim_in_windows": 256,
            "key_heads_by_layer": [8, 8, 8, 8, 8, 2] * 5,
            "num_head_dims": (1, 1),
            "rotary_dims": 512,
            "rope_type": "proportional",
            "window_period": 6,
        },
    ),
    "openai/gpt-oss-20b": (
        {
            "model_type": "gpt_oss",
            "num_hidden_layers": 24,
            "num_local_experts": 32,
            "rope_scaling": {"factor": 32.0, "original_max_position_embeddings": 4096, "rope_type": "yarn"},
            "rope_theta": 150000,
        },
        {"num_experts": 32, "window_period": 2, "rope_type": "yarn", "rope_theta": 150000, "original": 4096},
    ),
    "deepseek-ai/DeepSeek-V3": (
        {
            "model_type": "deepseek_v3",
            "max_position_embeddings": 163840,
            "rope_scaling": {"factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0, "type": "yarn"},
            "rope_theta": 10000,
        },
        {"key_length": 576, "value_length": 512, "num_key_value_heads": 1, "rotary_dims": 64, "rope_type": "yarn"},
    ),
    "zai-org/GLM-4.7-Flash": (
        {"model_type": "glm4_moe_lite", "first_k_dense_replace": 1, "num_hidden_layers": 47, "rope_theta": 1000000},
        {"first_k_dense_replace": 1, "num_experts": 64, "rotary_dims": 64, "rope_theta": 1e6},
    ),
    "zai-org/GLM-4.5-Air": (
        {"model_type": "glm4_moe", "head_dim": 128, "partial_rotary_factor": 0.5, "rope_theta": 1000000},
        {"head_dim": 128, "num_experts": 128, "rotary_dims": 64, "rope_theta": 1e6},
    ),
    "microsoft/Phi-3-mini-128k-instruct": (
        {
            "model_type": "phi3",
            "max_position_embeddings": 131072,
            "original_max_position_embeddings": 4096,
            "rope_scaling": {"type": "longrope", "short_factor": [1.1] * 48, "long_factor": [2.0] * 48},
        },
        {"rope_type": "longrope", "original": 4096, "rotary_dims": 96},
    ),
    "allenai/Olmo-3-7B-Instruct": (
        {
            "model_type": "olmo3",
            "max_position_embeddings": 65536,
            "rope_theta": 500000,
            "rope_scaling": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8192},
            "sliding_window": 4096,
        },
        {"window_period": 4, "rope_type": "yarn", "rope_theta": 5e5, "original": 8192},
    ),
    "THUDM/GLM-4-9B-0414": (
        {"model_type": "glm4", "head_dim": 128, "partial_rotary_factor": 0.5, "rope_theta": 10000.0},
        {"rotary_dims": 64, "rope_theta": 1e4, "rope_type": "default"},
    ),
    "CohereForAI/c4ai-command-r-v01": (
        {"model_type": "cohere", "max_position_embeddings": 8192, "model_max_length": 131072, "rope_theta": 8000000.0},
        {"max_position_embeddings": 131072, "rope_theta": 8e6, "head_dim": 128},
    ),
    "LiquidAI/LFM2-1.2B": (
        {
            "model_type": "lfm2",
            "hidden_size": 2048,
            "num_hidden_layers": 4,
            "block_ff_dim": 12288,
            "block_auto_adjust_ff_dim": True,
            "full_attn_idxs": [2],
            "rope_theta": 1000000.0,
        },
        {"intermediate_size": 8192, "key_heads_by_layer": [0, 0, 8, 0], "rope_theta": 1e6, "head_dim": 64},
    ),
    "Qwen/Qwen3-Next-80B-A3B-Instruct": (
        {
            "model_type": "qwen3_next",
            "full_attention_interval": 4,
            "head_dim": 256,
            "num_hidden_layers": 48,
            "partial_rotary_factor": 0.25,
            "rope_theta": 10000000,
        },
        {"linear_period": 4, "rotary_dims": 64, "rope_theta": 1e7, "norm_topk_prob": True},
    ),
    "Qwen/Qwen3.5-35B-A3B's text": (
        {
            "model_type": "qwen3_5_moe_text",
            "head_dim": 256,
            "num_hidden_layers": 40,
            "rope_parameters": {
                "mrope_interleaved": True,
                "mrope_section": [11, 11, 10],
                "partial_rotary_factor": 0.25,
                "rope_theta": 10000000,
                "rope_type": "default",
            },
        },
        {"linear_period": 4, "rotary_dims": 64, "rope_theta": 1e7, "num_experts": 256},
    ),
    "ibm-granite/granite-4.0-h-tiny": (
        {
            "model_type": "granitemoehybrid",
            "hidden_size": 1536,
            "layer_types": ["mamba", "attention", "mamba"],
            "mamba_n_heads": 48,
            "num_hidden_layers": 3,
            "num_key_value_heads": 4,
            "position_embedding_type": "nope",
        },
        {"key_heads_by_layer": [0, 4, 0], "max_position_embeddings": 2**20, "mamba_d_head": 64},
    ),
    "ibm-granite/granite-4.0-micro": (
        {
            "model_type": "granitemoehybrid",
            "layer_types": ["attention"] * 2,
            "num_hidden_layers": 2,
            "num_local_experts": 0,
            "position_embedding_type": "rope",
            "max_position_embeddings": 131072,
            "shared_intermediate_size": 8192,
        },
        {"architecture": "granite", "intermediate_size": 8192, "max_position_embeddings": 131072},
    ),
    "nvidia/Nemotron-H-8B-Base-8K": (
        {
            "model_type": "nemotron_h",
            "hybrid_override_pattern": "M-M*-",
            "intermediate_size": 21504,
            "num_hidden_layers": 5,
            "mamba_num_heads": 128,
            "mamba_head_dim": 64,
        },
        {
            "architecture": "nemotron_h",
            "key_heads_by_layer": [0, 0, 0, 8, 0],
            "feed_forward_by_layer": [0, 21504, 0, 0, 21504],
        },
    ),
    "ibm-ai-platform/Bamba-9B-v1": (
        {"model_type": "bamba", "attn_layer_indices": [1], "attn_rotary_emb": 64, "num_hidden_layers": 3},
        {"architecture": "granitehybrid", "key_heads_by_layer": [0, 8, 0], "rotary_dims": 64},
    ),
    "tencent/Hunyuan-7B-Instruct": (
        {
            "model_type": "hunyuan_v1_dense",
            "head_dim": 128,
            "max_position_embeddings": 32768,
            "rope_scaling": {"alpha": 1000.0, "factor": 1.0, "type": "dynamic"},
            "rope_theta": 10000.0,
        },
        {"max_position_embeddings": 262144, "rope_type": "default", "rope_theta": 1e4 * 1000 ** (128 / 126)},
    ),
    "mistralai/Mamba-Codestral-7B-v0.1": (
        {
            "model_type": "mamba2",
            "head_dim": 64,
            "n_groups": 8,
            "time_step_limit": [0.0, float("inf")],
            "num_heads": 128,
        },
        {"num_attention_heads": 0, "max_position_embeddings": 2**20, "intermediate_size": 0},
    ),
    "nvidia/Nemotron-Mini-4B-Instruct": (
        {"model_type": "nemotron", "head_dim": 128, "norm_eps": 1e-5, "rope_percent": 0.5, "rope_theta": 10000},
        {"rotary_dims": 64, "rope_theta": 1e4, "hidden_act": "relu2"},
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_spellings_of_configs_are_understood(name: str) -> None:
    published, expected = PUBLISHED[name]
    config = canonical_config(published)
    rope = rope_parameters(config)
    heads = config["num_attention_heads"]
    known = {
        **config,
        "architecture": family_of(config).name,
        "rotary_dims": rotary_dims(config) if heads else None,
        "rope_theta": rope["rope_theta"],
        "rope_type": rope["rope_type"],
        "original": rope.get("original_max_position_embeddings"),
        "window_period": window_period(config) if config.get("layer_types") else None,
        "linear_period": full_attention_period(config, "linear_attention") if config.get("layer_types") else None,
    }
    assert {key: known[key] for key in expected} == expected


def test_old_spelling_of_rope_settings_means_the_same() -> None:
    old = {**BASE, "rope_theta": 500000.0, "rope_scaling": {k: v for k, v in LLAMA3_ROPE.items() if k != "rope_theta"}}
    new = {**BASE, "rope_parameters": LLAMA3_ROPE}
    ours, theirs = rope_frequency_factors(old), rope_frequency_factors(new)
    assert ours is not None
    assert np.array_equal(ours, theirs)
    assert ours[0] == 1.0
    assert ours[-1] == 8.0
    assert rope_frequency_factors({**BASE, "rope_theta": 1e4}) is None
