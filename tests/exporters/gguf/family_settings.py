"""Sizes and settings that several small models of built-in families share."""

from __future__ import annotations

from typing import Any

from tests.exporters.gguf.conftest import BASE

VOCAB = BASE["vocab_size"]
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 1024}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [2.0 + 0.5 * i for i in range(8)],
    "original_max_position_embeddings": 256,
}

# Large initial weights: with small ones attention is flat and a wrong position or order hardly shows.
TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCAB,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SHARED = {**TINY, "num_key_value_heads": 2}  # two query heads share a key head
GEMMA = {**SHARED, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 32}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": VOCAB, "n_positions": 256, "initializer_range": 0.2}
GPT2 |= {"bos_token_id": 1, "eos_token_id": 2}
FALCON = {key: value for key, value in TINY.items() if key != "intermediate_size"}
NEW_FALCON = {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}
GEMMA3_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
}
# llama.cpp divides the variance of the gates by one less than their number, which shows where there are few.
GEMMA3N = {
    **SHARED,
    "num_hidden_layers": 3,
    "initializer_range": 0.05,
    "intermediate_size": 2048,
    "head_dim": 32,
    "sliding_window": 32,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "vocab_size_per_layer_input": VOCAB - 50,
    "num_kv_shared_layers": 0,
    "activation_sparsity_pattern": [0.95] * 3,
}
GEMMA3N_SHARED = {
    **GEMMA3N,
    "num_hidden_layers": 22,
    "initializer_range": 0.01,  # 22 layers amplify what differs in the gates
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 11,
    "activation_sparsity_pattern": [0.95] * 10 + [0.0] * 12,
}
# Attention is scaled by 1 here, so that small weights are enough; with large ones the f16 table of GELU shows.
GEMMA4 = {
    **SHARED,
    "num_hidden_layers": 4,
    "initializer_range": 0.05,
    "head_dim": 32,
    "global_head_dim": 64,
    "sliding_window": 32,
    "hidden_size_per_layer_input": 0,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
GEMMA4_E2B = {**GEMMA4, "hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": VOCAB}
GEMMA4_MOE = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 96}
GEMMA4_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
    "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.5, "rope_theta": 1e5, "factor": 4.0},
}
GPT_OSS = {
    **SHARED,
    "intermediate_size": 96,
    "head_dim": 32,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 32,
    "rope_parameters": {**YARN, "beta_fast": 32.0, "beta_slow": 1.0},
}
LLAMA4 = {
    **SHARED,
    "num_hidden_layers": 4,
    "intermediate_size": 96,
    "intermediate_size_mlp": 128,
    "head_dim": 32,
    "num_local_experts": 4,
    "interleave_moe_layer_step": 2,
}
MLA = {
    **TINY,
    "num_key_value_heads": 4,
    "num_hidden_layers": 3,
    "q_lora_rank": 48,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 16,
    "v_head_dim": 20,
    "moe_intermediate_size": 96,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "routed_scaling_factor": 1.7,
}
DEEPSEEK = {**MLA, "first_k_dense_replace": 1}
MSCALE = {**YARN, "original_max_position_embeddings": 64, "mscale": 0.7, "mscale_all_dim": 0.7}
GLM4_MOE = {
    **SHARED,
    "num_hidden_layers": 3,
    "head_dim": 32,
    "moe_intermediate_size": 96,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "routed_scaling_factor": 1.7,
}
ERNIE_MOE = {
    **SHARED,
    "num_hidden_layers": 3,
    "moe_intermediate_size": 96,
    "moe_num_experts": 8,
    "moe_k": 3,
    "moe_num_shared_experts": 2,
}
MINISTRAL3_ROPE = {
    **YARN,
    "original_max_position_embeddings": 64,
    "beta_fast": 16.0,
    "beta_slow": 2.0,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,
    "llama_4_scaling_beta": 0.1,
}
MINISTRAL3 = {**SHARED, "head_dim": 32, "rope_parameters": MINISTRAL3_ROPE}
EXAONE4 = {**SHARED, "sliding_window": None, "layer_types": ["full_attention"] * 2}
MIXTRAL = {**SHARED, "num_local_experts": 8, "sliding_window": None}
QWEN3_MOE = {**SHARED, "head_dim": 32, "moe_intermediate_size": 96, "num_experts": 16, "num_experts_per_tok": 4}
QWEN2_MOE = {**SHARED, "moe_intermediate_size": 96, "shared_expert_intermediate_size": 128, "num_experts": 8}
DELTA_NET = {
    **SHARED,
    "head_dim": 32,
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "linear_attention", "full_attention"],
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
}
DELTA_NET_MOE = {**DELTA_NET, **QWEN2_MOE, "num_hidden_layers": 3, "num_experts_per_tok": 3}
GRANITE = {"embedding_multiplier": 3.0, "attention_multiplier": 0.1, "residual_multiplier": 0.5, "logits_scaling": 2.0}
GRANITE_MOE = {**SHARED, **GRANITE, "intermediate_size": 96, "num_local_experts": 8, "num_experts_per_tok": 3}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 2, "mamba_chunk_size": 64}
GRANITE_HYBRID = {
    **GRANITE_MOE,
    **MAMBA,
    "shared_intermediate_size": 128,
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
BAMBA = {**SHARED, **MAMBA, "num_hidden_layers": 3, "attn_layer_indices": [1]}
MAMBA2 = {"num_heads": 4, "head_dim": 32, "state_size": 16, "n_groups": 2, "chunk_size": 64}
MAMBA2 |= {key: TINY[key] for key in ("hidden_size", "num_hidden_layers", "vocab_size", "initializer_range")}
NEMOTRON_H = {
    **{key: value for key, value in SHARED.items() if key != "num_hidden_layers"},
    **{"mamba_num_heads": 4, "mamba_head_dim": 32, "ssm_state_size": 16, "n_groups": 2, "chunk_size": 64},
    "head_dim": 32,
    "layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp"],
}
NEMOTRON_H_MOE = {
    **NEMOTRON_H,
    "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
    "moe_intermediate_size": 96,
    "moe_shared_expert_intermediate_size": 128,
    "num_experts_per_tok": 3,
}
HUNYUAN = {**SHARED, "head_dim": 32}
WITHOUT_EXPERTS = {"num_local_experts": 0, "num_experts_per_tok": 0}
OLMO3 = {**SHARED, "num_hidden_layers": 5, "sliding_window": 32}
OLMO3_ROPE = {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}, "full_attention": YARN}
LFM2 = {**SHARED, "num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]}
LFM2_MOE = {**LFM2, "num_dense_layers": 1, "moe_intermediate_size": 96, "num_experts": 8, "num_experts_per_tok": 3}
BLOOM = {"hidden_size": 96, "n_layer": 2, "vocab_size": VOCAB, "initializer_range": 0.2}
