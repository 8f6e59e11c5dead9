"""Sizes and settings that several of the small models share."""

from __future__ import annotations

from typing import Any

Config = dict[str, Any]


def small(*without: str, **changed: Any) -> Config:
    """The sizes that all share, without some and with others."""
    config = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 3072,
        "max_position_embeddings": 512,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": None,
        **changed,
    }
    return {name: value for name, value in config.items() if name not in without}


def default_rope(theta: float = 1e4, **more: Any) -> Config:
    """Plain rotary embeddings."""
    return {"rope_type": "default", "rope_theta": theta, **more}


HD = "head_dim"
UNSCALED = ("Gemma3nTextAttention", "Gemma4TextAttention")  # softmax of q·k as it is
EVERY_SECOND_FULL = ["sliding_attention", "full_attention"] * 2
EVERY_SECOND_LINEAR = ["linear_attention", "full_attention"] * 2
EVERY_SECOND_CONV = ["conv", "full_attention"] * 2
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
SHARED_EXPERT = {**EXPERTS, "shared_expert_intermediate_size": 128}
MIXTRAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
TWO_ROPES = {"sliding_attention": default_rope(), "full_attention": default_rope(1e6)}
GEMMA4_ROPES = {
    "sliding_attention": default_rope(),
    "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
}
DELTA_NET = {
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    "rope_parameters": default_rope(partial_rotary_factor=0.25),
    "head_dim": 64,
}
MLA_HEADS = {
    "kv_lora_rank": 64,
    "q_lora_rank": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "qk_nope_head_dim": 32,
    "num_key_value_heads": 4,
}
GROUPED_EXPERTS = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "n_group": 1,
    "topk_group": 1,
}
DEEPSEEK = {**MLA_HEADS, **GROUPED_EXPERTS, "first_k_dense_replace": 1}
MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 32,
    "mamba_n_groups": 1,
    "mamba_d_state": 32,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_chunk_size": 32,
}
NEMOTRON_H = {
    "mamba_num_heads": 8,
    "mamba_head_dim": 32,
    "n_groups": 1,
    "ssm_state_size": 32,
    "chunk_size": 32,
    "expand": 2,
    "pad_token_id": 1,
}
GRANITE = {
    "embedding_multiplier": 12.0,
    "logits_scaling": 8.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.0156,
}
GEMMA3 = small(
    query_pre_attn_scalar=32,
    sliding_window=16,
    layer_types=EVERY_SECOND_FULL,
    rope_parameters=TWO_ROPES,
    tie_word_embeddings=True,
)
GEMMA3N = small(
    num_hidden_layers=22,
    vocab_size_per_layer_input=3072,
    hidden_size_per_layer_input=256,
    laurel_rank=64,
    num_kv_shared_layers=2,
    altup_num_inputs=4,
    sliding_window=16,
    layer_types=["sliding_attention", "full_attention"] * 11,
    rope_parameters=TWO_ROPES,
    activation_sparsity_pattern=[0.95] * 10 + [0.0] * 12,
    intermediate_size=[2048] * 22,
    pad_token_id=1,
)
GEMMA4 = small(
    hidden_activation="gelu_pytorch_tanh",
    rope_parameters=GEMMA4_ROPES,
    sliding_window=16,
    layer_types=EVERY_SECOND_FULL,
    tie_word_embeddings=True,
    vocab_size_per_layer_input=3072,
    hidden_size_per_layer_input=32,
    num_kv_shared_layers=2,
    pad_token_id=1,
    per_layer_config={"01": {"head_dim": 64}, "03": {"head_dim": 64}},
)
GEMMA4_OWN_KEYS = {**GEMMA4, "num_kv_shared_layers": 0}
GEMMA4_PLAIN = {**GEMMA4_OWN_KEYS, "hidden_size_per_layer_input": 0}
SIGLIP = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 64,
    "patch_size": 16,
}
QWEN_VISION = {
    "depth": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 2,
    "in_channels": 3,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 128,
    "num_position_embeddings": 64,
}
QWEN_TOKENS = {
    "image_token_id": 3000,
    "video_token_id": 3001,
    "vision_start_token_id": 3002,
    "vision_end_token_id": 3003,
}
MROPE = default_rope(mrope_section=[4, 6, 6])
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "partial_rotary_factor": 0.75,
    "long_factor": [2.0] * 12,
    "short_factor": [1.0] * 12,
    "original_max_position_embeddings": 256,
}
