"""One row for each built-in family: a small model of it, and the kind of tokenizer that its published models have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import (
    ArceeConfig,
    BambaConfig,
    BloomConfig,
    CohereConfig,
    DeepseekV2Config,
    DeepseekV3Config,
    Ernie4_5_MoeConfig,
    Ernie4_5Config,
    Exaone4Config,
    FalconConfig,
    Gemma2Config,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    Gemma4TextConfig,
    Glm4Config,
    Glm4MoeConfig,
    Glm4MoeLiteConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    GraniteMoeConfig,
    GraniteMoeHybridConfig,
    GraniteMoeSharedConfig,
    HunYuanDenseV1Config,
    Lfm2Config,
    Lfm2MoeConfig,
    Llama4TextConfig,
    LlamaConfig,
    Mamba2Config,
    Ministral3Config,
    MistralConfig,
    MixtralConfig,
    NemotronConfig,
    NemotronHConfig,
    Olmo2Config,
    Olmo3Config,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    SeedOssConfig,
    SmolLM3Config,
)

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
_TINY: dict[str, Any] = {
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
_SHARED = {**_TINY, "num_key_value_heads": 2}  # two query heads share a key head
_GEMMA = {**_SHARED, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 32}
_GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": VOCAB, "n_positions": 256, "initializer_range": 0.2}
_GPT2 |= {"bos_token_id": 1, "eos_token_id": 2}
_FALCON = {key: value for key, value in _TINY.items() if key != "intermediate_size"}
_NEW_FALCON = {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}
_GEMMA3_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
}
# llama.cpp divides the variance of the gates by one less than their number, which shows where there are few.
_GEMMA3N = {
    **_SHARED,
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
_GEMMA3N_SHARED = {
    **_GEMMA3N,
    "num_hidden_layers": 22,
    "initializer_range": 0.01,  # 22 layers amplify what differs in the gates
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 11,
    "activation_sparsity_pattern": [0.95] * 10 + [0.0] * 12,
}
# Attention is scaled by 1 here, so that small weights are enough; with large ones the f16 table of GELU shows.
_GEMMA4 = {
    **_SHARED,
    "num_hidden_layers": 4,
    "initializer_range": 0.05,
    "head_dim": 32,
    "global_head_dim": 64,
    "sliding_window": 32,
    "hidden_size_per_layer_input": 0,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
_GEMMA4_E2B = {**_GEMMA4, "hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": VOCAB}
_GEMMA4_MOE = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 96}
_GEMMA4_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
    "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.5, "rope_theta": 1e5, "factor": 4.0},
}
_GPT_OSS = {
    **_SHARED,
    "intermediate_size": 96,
    "head_dim": 32,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 32,
    "rope_parameters": {**YARN, "beta_fast": 32.0, "beta_slow": 1.0},
}
_LLAMA4 = {
    **_SHARED,
    "num_hidden_layers": 4,
    "intermediate_size": 96,
    "intermediate_size_mlp": 128,
    "head_dim": 32,
    "num_local_experts": 4,
    "interleave_moe_layer_step": 2,
}
_MLA = {
    **_TINY,
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
_DEEPSEEK = {**_MLA, "first_k_dense_replace": 1}
_MSCALE = {**YARN, "original_max_position_embeddings": 64, "mscale": 0.7, "mscale_all_dim": 0.7}
_GLM4_MOE = {
    **_SHARED,
    "num_hidden_layers": 3,
    "head_dim": 32,
    "moe_intermediate_size": 96,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "routed_scaling_factor": 1.7,
}
_ERNIE_MOE = {
    **_SHARED,
    "num_hidden_layers": 3,
    "moe_intermediate_size": 96,
    "moe_num_experts": 8,
    "moe_k": 3,
    "moe_num_shared_experts": 2,
}
_MINISTRAL3_ROPE = {
    **YARN,
    "original_max_position_embeddings": 64,
    "beta_fast": 16.0,
    "beta_slow": 2.0,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,
    "llama_4_scaling_beta": 0.1,
}
_MINISTRAL3 = {**_SHARED, "head_dim": 32, "rope_parameters": _MINISTRAL3_ROPE}
_EXAONE4 = {**_SHARED, "sliding_window": None, "layer_types": ["full_attention"] * 2}
_MIXTRAL = {**_SHARED, "num_local_experts": 8, "sliding_window": None}
_QWEN3_MOE = {**_SHARED, "head_dim": 32, "moe_intermediate_size": 96, "num_experts": 16, "num_experts_per_tok": 4}
_QWEN2_MOE = {**_SHARED, "moe_intermediate_size": 96, "shared_expert_intermediate_size": 128, "num_experts": 8}
_DELTA_NET = {
    **_SHARED,
    "head_dim": 32,
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "linear_attention", "full_attention"],
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
}
_DELTA_NET_MOE = {**_DELTA_NET, **_QWEN2_MOE, "num_hidden_layers": 3, "num_experts_per_tok": 3}
_GRANITE = {"embedding_multiplier": 3.0, "attention_multiplier": 0.1, "residual_multiplier": 0.5, "logits_scaling": 2.0}
_GRANITE_MOE = {**_SHARED, **_GRANITE, "intermediate_size": 96, "num_local_experts": 8, "num_experts_per_tok": 3}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 2, "mamba_chunk_size": 64}
_GRANITE_HYBRID = {
    **_GRANITE_MOE,
    **_MAMBA,
    "shared_intermediate_size": 128,
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
_BAMBA = {**_SHARED, **_MAMBA, "num_hidden_layers": 3, "attn_layer_indices": [1]}
_MAMBA2 = {"num_heads": 4, "head_dim": 32, "state_size": 16, "n_groups": 2, "chunk_size": 64}
_MAMBA2 |= {key: _TINY[key] for key in ("hidden_size", "num_hidden_layers", "vocab_size", "initializer_range")}
_NEMOTRON_H = {
    **{key: value for key, value in _SHARED.items() if key != "num_hidden_layers"},
    **{"mamba_num_heads": 4, "mamba_head_dim": 32, "ssm_state_size": 16, "n_groups": 2, "chunk_size": 64},
    "head_dim": 32,
    "layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp"],
}
_NEMOTRON_H_MOE = {
    **_NEMOTRON_H,
    "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
    "moe_intermediate_size": 96,
    "moe_shared_expert_intermediate_size": 128,
    "num_experts_per_tok": 3,
}
_HUNYUAN = {**_SHARED, "head_dim": 32}
_WITHOUT_EXPERTS = {"num_local_experts": 0, "num_experts_per_tok": 0}
_OLMO3 = {**_SHARED, "num_hidden_layers": 5, "sliding_window": 32}
_OLMO3_ROPE = {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}, "full_attention": YARN}
_LFM2 = {**_SHARED, "num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]}
_LFM2_MOE = {**_LFM2, "num_dense_layers": 1, "moe_intermediate_size": 96, "num_experts": 8, "num_experts_per_tok": 3}
_BLOOM = {"hidden_size": 96, "n_layer": 2, "vocab_size": VOCAB, "initializer_range": 0.2}


@dataclass(frozen=True)
class Row:
    """A family.

    Attributes:
        config: a small model.
        tokenizer: name of a kind in test_gguf_families.tokenizer_folder; another kind of the same build stands in for
            those that are known by their hash alone.
        pre: what tokenizer.ggml.pre must be; None where the kind of tokenizer has none.
    """

    config: PretrainedConfig
    tokenizer: str
    pre: str | None


FAMILIES = {
    "llama": Row(LlamaConfig(**BASE), "llama3", "llama-bpe"),
    "mistral": Row(MistralConfig(**BASE, sliding_window=None), "sentencepiece", "default"),
    "mixtral": Row(MixtralConfig(**_MIXTRAL), "sentencepiece", "default"),
    "qwen2": Row(Qwen2Config(**BASE), "qwen2", "qwen2"),
    "qwen3": Row(Qwen3Config(**BASE, head_dim=128), "qwen2", "qwen2"),
    "qwen3_moe": Row(Qwen3MoeConfig(**_QWEN3_MOE, norm_topk_prob=True), "qwen2", "qwen2"),
    "smollm3": Row(SmolLM3Config(**{**_SHARED, "num_hidden_layers": 5}), "llama3", "llama-bpe"),
    "gpt2": Row(GPT2Config(**_GPT2), "gpt2", "gpt-2"),
    "gpt_neox": Row(GPTNeoXConfig(**_TINY), "gpt_neox", "gpt-2"),
    "bloom": Row(BloomConfig(**_BLOOM, n_head=6), "bloom", "bloom"),  # 6 heads: ALiBi's second series of slopes
    "falcon": Row(FalconConfig(**_FALCON), "falcon", "falcon"),
    "falcon_new_decoder": Row(FalconConfig(**_NEW_FALCON), "falcon", "falcon"),
    "phi3": Row(Phi3Config(**_SHARED), "sentencepiece", "default"),
    "gemma2": Row(Gemma2Config(**_GEMMA), "gemma", "default"),
    "gemma3": Row(Gemma3TextConfig(**{**_GEMMA, "num_hidden_layers": 7}), "gemma", "default"),
    "gemma3n": Row(Gemma3nTextConfig(**_GEMMA3N), "gemma", "default"),
    "gemma4": Row(Gemma4TextConfig(**_GEMMA4), "gemma4", None),
    "olmo2": Row(Olmo2Config(**_SHARED), "olmo2", "smaug-bpe"),
    "olmo3": Row(Olmo3Config(**_OLMO3), "olmo2", "smaug-bpe"),
    "granite": Row(GraniteConfig(**_SHARED, **_GRANITE), "single_digits", "smollm"),
    "granitemoe": Row(GraniteMoeConfig(**_GRANITE_MOE), "single_digits", "smollm"),
    "granitemoeshared": Row(
        GraniteMoeSharedConfig(**_GRANITE_MOE, shared_intermediate_size=128), "single_digits", "smollm"
    ),
    "granitemoehybrid": Row(GraniteMoeHybridConfig(**_GRANITE_HYBRID), "llama3", "llama-bpe"),
    "ernie4_5": Row(Ernie4_5Config(**_SHARED, head_dim=32), "sentencepiece", "default"),
    "glm4": Row(Glm4Config(**_SHARED, head_dim=32), "llama3", "llama-bpe"),
    "gpt_oss": Row(GptOssConfig(**_GPT_OSS), "gpt4o", "gpt-4o"),
    "llama4": Row(Llama4TextConfig(**_LLAMA4), "gpt4o", "gpt-4o"),
    "deepseek_v2": Row(DeepseekV2Config(**_DEEPSEEK), "llama3", "llama-bpe"),
    "deepseek_v3": Row(
        DeepseekV3Config(
            **_DEEPSEEK, n_group=4, topk_group=2, rope_parameters={**_MSCALE, "mscale": 1.0, "mscale_all_dim": 1.0}
        ),
        "llama3",
        "llama-bpe",
    ),
    "glm4_moe_lite": Row(Glm4MoeLiteConfig(**_MLA), "llama3", "llama-bpe"),
    "glm4_moe": Row(Glm4MoeConfig(**_GLM4_MOE), "llama3", "llama-bpe"),
    "ernie4_5_moe": Row(Ernie4_5_MoeConfig(**_ERNIE_MOE), "sentencepiece", "default"),
    "ministral3": Row(
        Ministral3Config(**_SHARED, head_dim=32, rope_parameters=_MINISTRAL3_ROPE), "llama3", "llama-bpe"
    ),
    "exaone4": Row(
        Exaone4Config(**_SHARED, sliding_window=None, layer_types=["full_attention"] * 2), "llama3", "llama-bpe"
    ),
    "seed_oss": Row(SeedOssConfig(**_SHARED, head_dim=32), "llama3", "llama-bpe"),
    "arcee": Row(ArceeConfig(**_SHARED), "llama3", "llama-bpe"),
    "cohere": Row(CohereConfig(**_SHARED, logit_scale=0.5), "single_digits", "smollm"),
    "nemotron": Row(NemotronConfig(**_SHARED), "sentencepiece", "default"),
    "qwen2_moe": Row(Qwen2MoeConfig(**_QWEN2_MOE, num_experts_per_tok=3), "qwen2", "qwen2"),
    "qwen3_next": Row(Qwen3NextConfig(**_DELTA_NET_MOE), "qwen2", "qwen2"),
    "qwen3_5": Row(Qwen3_5TextConfig(**_DELTA_NET), "qwen3_5", "qwen35"),
    "qwen3_5_moe": Row(Qwen3_5MoeTextConfig(**_DELTA_NET_MOE), "qwen3_5", "qwen35"),
    "bamba": Row(BambaConfig(**_BAMBA), "llama3", "llama-bpe"),
    "mamba2": Row(Mamba2Config(**_MAMBA2), "gpt_neox", "gpt-2"),
    "nemotron_h": Row(NemotronHConfig(**_NEMOTRON_H), "llama3", "llama-bpe"),
    "nemotron_h_moe": Row(NemotronHConfig(**_NEMOTRON_H_MOE), "llama3", "llama-bpe"),
    "hunyuan_v1_dense": Row(HunYuanDenseV1Config(**_HUNYUAN), "qwen2", "qwen2"),
    "lfm2": Row(Lfm2Config(**_LFM2, block_multiple_of=32), "llama3", "llama-bpe"),
    "lfm2_moe": Row(Lfm2MoeConfig(**_LFM2_MOE), "llama3", "llama-bpe"),
}

# Other models of these families: settings that change the metadata, the order of rows or the tensors.
VARIANTS: dict[str, PretrainedConfig] = {
    "llama_tied_with_biases": LlamaConfig(**BASE, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "llama_wide_heads": LlamaConfig(**BASE, head_dim=128),
    "llama3_rope": LlamaConfig(**BASE, rope_parameters=LLAMA3_ROPE),
    "llama_linear_rope": LlamaConfig(**BASE, rope_parameters=LINEAR),
    "mixtral_of_4": MixtralConfig(**{**_MIXTRAL, "num_local_experts": 4}, num_experts_per_tok=3),
    "qwen2_yarn": Qwen2Config(**BASE, rope_parameters=YARN),
    "qwen2_yarn_attention": Qwen2Config(**BASE, rope_parameters={**YARN, "attention_factor": 1.3}),
    "qwen2_of_qwen2_vl": Qwen2Config(**BASE, mrope_section=[8, 12, 12]),
    "qwen3_of_qwen3_vl": Qwen3Config(
        **BASE,
        head_dim=128,
        mrope_section=[24, 20, 20],
        num_deepstack_layers=3,
        rope_parameters={"rope_type": "default", "rope_theta": 5e6},
    ),
    "qwen3_moe_of_qwen3_vl_moe": Qwen3MoeConfig(
        **_QWEN3_MOE, norm_topk_prob=True, mrope_section=[6, 5, 5], num_deepstack_layers=3
    ),
    "smollm3_yarn": SmolLM3Config(**{**_SHARED, "num_hidden_layers": 5}, rope_parameters=YARN),
    "gpt2_narrow_feed_forward": GPT2Config(**_GPT2, n_inner=96),
    "gpt_neox_sequential": GPTNeoXConfig(**_TINY, use_parallel_residual=False),
    "gpt_neox_half_rotated": GPTNeoXConfig(**_TINY, rope_parameters={**YARN, "partial_rotary_factor": 0.5}),
    "bloom_8_heads": BloomConfig(**_BLOOM, n_head=8),
    "falcon_multi_head": FalconConfig(**_FALCON, multi_query=False),
    "falcon_one_norm": FalconConfig(**_NEW_FALCON, num_ln_in_parallel_attn=1),
    "phi3_partial_rotary": Phi3Config(
        **_SHARED, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}
    ),
    "phi3_tied": Phi3Config(**_SHARED, tie_word_embeddings=True),
    "gemma2_window_period_3": Gemma2Config(
        **{**_GEMMA, "num_hidden_layers": 4},
        layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
    ),
    "gemma3_window_period_2": Gemma3TextConfig(
        **{**_GEMMA, "num_hidden_layers": 4}, layer_types=["sliding_attention", "full_attention"] * 2
    ),
    "gemma3_without_windows": Gemma3TextConfig(**_GEMMA, layer_types=["full_attention"] * 2),
    "gemma3_rope": Gemma3TextConfig(**{**_GEMMA, "num_hidden_layers": 7}, rope_parameters=_GEMMA3_ROPE),
    "gemma3_soft_cap": Gemma3TextConfig(**_GEMMA, final_logit_softcapping=5.0),
    "gemma3n_shared": Gemma3nTextConfig(**_GEMMA3N_SHARED),
    "gemma4_e2b": Gemma4TextConfig(**_GEMMA4_E2B, num_kv_shared_layers=2, use_double_wide_mlp=True),
    "gemma4_moe": Gemma4TextConfig(**_GEMMA4, **_GEMMA4_MOE),
    "gemma4_keys_as_values": Gemma4TextConfig(
        **_GEMMA4, attention_k_eq_v=True, num_global_key_value_heads=1, final_logit_softcapping=5.0
    ),
    "gemma4_rope": Gemma4TextConfig(**_GEMMA4, rope_parameters=_GEMMA4_ROPE),
    "olmo2_yarn": Olmo2Config(**_SHARED, rope_parameters=YARN),
    "olmo3_yarn_window_period_2": Olmo3Config(
        **{**_OLMO3, "num_hidden_layers": 4},
        rope_parameters=_OLMO3_ROPE,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
    "olmo3_without_windows": Olmo3Config(**_OLMO3, layer_types=["full_attention"] * 5),
    "granite_tied_with_biases": GraniteConfig(
        **_SHARED, **_GRANITE, tie_word_embeddings=True, attention_bias=True, mlp_bias=True
    ),
    "granite_llama3_rope": GraniteConfig(**_SHARED, **_GRANITE, rope_parameters=LLAMA3_ROPE),
    "granitemoehybrid_dense": GraniteMoeHybridConfig(
        **{**_GRANITE_HYBRID, **_WITHOUT_EXPERTS}, position_embedding_type="rope", attention_bias=True
    ),
    "granitemoehybrid_without_mamba": GraniteMoeHybridConfig(
        **{**_GRANITE_HYBRID, **_WITHOUT_EXPERTS, "layer_types": ["full_attention"] * 3},
        position_embedding_type="rope",
        tie_word_embeddings=True,
    ),
    "granitemoehybrid_experts_without_mamba": GraniteMoeHybridConfig(
        **{**_GRANITE_HYBRID, "layer_types": ["full_attention"] * 3}, position_embedding_type="rope"
    ),
    "ernie4_5_untied": Ernie4_5Config(**_SHARED, head_dim=16, tie_word_embeddings=False),
    "glm4_without_biases": Glm4Config(**_SHARED, head_dim=16, attention_bias=False, tie_word_embeddings=True),
    "arcee_wide_heads": ArceeConfig(**_SHARED, head_dim=32, rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True),
    "arcee_yarn": ArceeConfig(**_SHARED, rope_parameters=YARN),
    "cohere_query_norms": CohereConfig(
        **{**_SHARED, "num_hidden_layers": 64, "initializer_range": 0.1}, use_qk_norm=True
    ),
    "gpt_oss_windows": GptOssConfig(
        **{**_GPT_OSS, "num_hidden_layers": 3},
        layer_types=["full_attention", "sliding_attention", "sliding_attention"],
    ),
    "llama4_rope": Llama4TextConfig(
        **_LLAMA4, rope_parameters={**LLAMA3_ROPE, "high_freq_factor": 1.0}, tie_word_embeddings=True
    ),
    "deepseek_v2_lite": DeepseekV2Config(**{**_DEEPSEEK, "q_lora_rank": None}, rope_parameters=_MSCALE),
    "deepseek_v3_one_group": DeepseekV3Config(**_DEEPSEEK, n_group=1, topk_group=1, norm_topk_prob=False),
    "glm4_moe_lite_two_dense": Glm4MoeLiteConfig(
        **_MLA, mlp_layer_types=["dense", "dense", "sparse"], tie_word_embeddings=True
    ),
    "glm4_moe_norms": Glm4MoeConfig(
        **_GLM4_MOE, use_qk_norm=True, attention_bias=True, n_group=4, topk_group=2, norm_topk_prob=False
    ),
    "ernie4_5_moe_unshared": Ernie4_5_MoeConfig(**{**_ERNIE_MOE, "moe_num_shared_experts": 0}, moe_layer_start_index=2),
    "exaone4_of_64_layers": Exaone4Config(
        **{**_SHARED, "num_hidden_layers": 64, "initializer_range": 0.1}, sliding_window=32, rope_parameters=LLAMA3_ROPE
    ),
    "seed_oss_yarn": SeedOssConfig(**_SHARED, head_dim=16, rope_parameters=YARN, tie_word_embeddings=True),
    "nemotron_with_biases": NemotronConfig(**_SHARED, attention_bias=True, mlp_bias=True),
    "qwen2_moe_without_biases": Qwen2MoeConfig(**_QWEN2_MOE, num_experts_per_tok=3, qkv_bias=False),
    "qwen3_next_more_value_heads": Qwen3NextConfig(**{**_DELTA_NET_MOE, "linear_num_value_heads": 4}),
    "qwen3_5_more_value_heads": Qwen3_5TextConfig(**{**_DELTA_NET, "linear_num_value_heads": 6}),
    "qwen3_5_other_layers": Qwen3_5TextConfig(
        **{**_DELTA_NET, "layer_types": ["full_attention", "linear_attention", "linear_attention"]},
        rope_parameters={**YARN, "partial_rotary_factor": 0.5},
        tie_word_embeddings=True,
    ),
    "bamba_tied_with_biases": BambaConfig(**_BAMBA, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "mamba2_tied": Mamba2Config(**_MAMBA2, tie_word_embeddings=True, conv_kernel=3),
    "nemotron_h_with_biases": NemotronHConfig(**_NEMOTRON_H, mlp_bias=True, tie_word_embeddings=True),
    "nemotron_h_moe_groups": NemotronHConfig(
        **{**_NEMOTRON_H_MOE, "norm_topk_prob": False},
        n_group=2,
        moe_latent_size=32,
        routed_scaling_factor=2.5,
    ),
    "hunyuan_alpha": HunYuanDenseV1Config(
        **_HUNYUAN, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "alpha": 50.0, "factor": 1.0}
    ),
    "hunyuan_tied_yarn": HunYuanDenseV1Config(**_HUNYUAN, tie_word_embeddings=True, rope_parameters=YARN),
    "lfm2_untied": Lfm2Config(**_LFM2, conv_L_cache=4, block_auto_adjust_ff_dim=False, tie_word_embeddings=False),
}

LONG_PHI3 = Phi3Config(
    **{**_SHARED, "max_position_embeddings": 1024, "original_max_position_embeddings": 256}, rope_parameters=LONGROPE
)

# (config, what the refusal says). llama.cpp would compute something else, or not load the file.
REFUSED: dict[str, tuple[PretrainedConfig, str]] = {
    "activation": (LlamaConfig(**BASE, hidden_act="gelu"), "gelu.*--template"),
    "output_bias": (Qwen3Config(**BASE, head_dim=64, attention_bias=True), r"o_proj\.bias.*--template"),
    "qwen3_moe_weights": (Qwen3MoeConfig(**_QWEN3_MOE, norm_topk_prob=False), "norm_topk_prob.*--template"),
    "qwen3_moe_dense_layer": (
        Qwen3MoeConfig(**_QWEN3_MOE, norm_topk_prob=True, mlp_only_layers=[1]),
        r"layers\.1\.mlp\.gate_proj\.weight has no place.*--template",
    ),
    "llama_longrope": (
        LlamaConfig(
            **BASE,
            rope_parameters={
                **LONGROPE,
                "factor": 4.0,
                "short_factor": [1.0] * 32,
                "long_factor": [2.0] * 32,
            },
        ),
        "longrope.*--template",
    ),
    "qwen2_llama3_rope": (Qwen2Config(**BASE, rope_parameters=LLAMA3_ROPE), "llama3.*qwen2.*--template"),
    "smollm3_bias": (SmolLM3Config(**_SHARED, attention_bias=True), r"o_proj\.bias.*--template"),
    "smollm3_no_rope": (SmolLM3Config(**_SHARED, no_rope_layers=[0, 1]), "every fourth layer.*--template"),
    "gpt2_scale": (GPT2Config(**_GPT2, scale_attn_by_inverse_layer_idx=True), "scale_attn.*--template"),
    "gpt2_activation": (GPT2Config(**_GPT2, activation_function="relu"), "gelu_new.*relu.*--template"),
    "gpt_neox_tied": (GPTNeoXConfig(**_TINY, tie_word_embeddings=True), "output head.*--template"),
    "gpt_neox_biases": (GPTNeoXConfig(**_TINY, attention_bias=False), "biases.*--template"),
    "bloom_residual": (
        BloomConfig(**_BLOOM, n_head=8, apply_residual_connection_post_layernorm=True),
        "residual.*--template",
    ),
    "falcon_alibi": (FalconConfig(**_FALCON, alibi=True), "ALiBi.*--template"),
    "falcon_sequential": (FalconConfig(**_FALCON, parallel_attn=False), r"side by side.*--template"),
    "falcon_bias": (FalconConfig(**_FALCON, bias=True), "biases.*--template"),
    "gemma2_soft_cap": (Gemma2Config(**_GEMMA, attn_logit_softcapping=None), "soft caps.*--template"),
    "gemma2_scale": (
        Gemma2Config(**{**_GEMMA, "query_pre_attn_scalar": 16}),
        "scales attention by 32 .* this model by 16.*--template",
    ),
    "gemma2_no_windows": (Gemma2Config(**_GEMMA, layer_types=["full_attention"] * 2), "windows.*--template"),
    "gemma3_layers": (
        Gemma3TextConfig(**_GEMMA, layer_types=["full_attention", "sliding_attention"]),
        "layer_types.*--template",
    ),
    "gemma3_bias": (Gemma3TextConfig(**_GEMMA, attention_bias=True), r"_proj\.bias.*--template"),
    "gemma3n_laurel": (Gemma3nTextConfig(**_GEMMA3N, laurel_rank=32), "laurel_rank 64.*32.*--template"),
    "gemma3n_shared": (
        Gemma3nTextConfig(**{**_GEMMA3N, "num_kv_shared_layers": 1}),
        "first 20 layers.*first 2.*--template",
    ),
    "gemma3n_sparsity": (
        Gemma3nTextConfig(**{**_GEMMA3N, "activation_sparsity_pattern": [0.95, 0.0, 0.0]}),
        "5 % of the gates.*--template",
    ),
    "gemma4_shared": (
        Gemma4TextConfig(
            **{
                **_GEMMA4_E2B,
                "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
            },
            num_kv_shared_layers=1,
        ),
        "last two layers that have their own.*--template",
    ),
    "gemma4_bias": (Gemma4TextConfig(**_GEMMA4, attention_bias=True), r"_proj\.bias.*--template"),
    "olmo2_tied": (Olmo2Config(**_SHARED, tie_word_embeddings=True), "output head.*--template"),
    "olmo2_wide_heads": (Olmo2Config(**_SHARED, head_dim=32), "as wide as the model.*--template"),
    "olmo2_bias": (Olmo2Config(**_SHARED, attention_bias=True), r"_proj\.bias.*--template"),
    "olmo3_layers": (
        Olmo3Config(**_OLMO3, layer_types=["full_attention", *["sliding_attention"] * 4]),
        "layer_types.*--template",
    ),
    "olmo3_window_theta": (
        Olmo3Config(
            **_OLMO3,
            rope_parameters={**_OLMO3_ROPE, "sliding_attention": {"rope_type": "default", "rope_theta": 500.0}},
        ),
        "one rope_theta.*--template",
    ),
    "olmo3_window_scaling": (
        Olmo3Config(**_OLMO3, rope_parameters={**_OLMO3_ROPE, "sliding_attention": LINEAR}),
        "unscaled rotation.*--template",
    ),
    "granitemoehybrid_bias": (
        GraniteMoeHybridConfig(**_GRANITE_HYBRID, mamba_proj_bias=True),
        r"mamba\.in_proj\.bias has no place.*--template",
    ),
    "granitemoehybrid_conv_bias": (
        GraniteMoeHybridConfig(**_GRANITE_HYBRID, mamba_conv_bias=False),
        "biases of its convolutions.*--template",
    ),
    "granitemoehybrid_width": (
        GraniteMoeHybridConfig(**{**_GRANITE_HYBRID, "mamba_d_head": 64}, mamba_expand=4),
        "twice the hidden size.*have 4 times.*--template",
    ),
    "granitemoehybrid_positions": (
        GraniteMoeHybridConfig(**{**_GRANITE_HYBRID, "layer_types": ["full_attention"] * 3}),
        "granitemoe has rotary positions.*--template",
    ),
    "granitemoehybrid_time_steps": (
        GraniteMoeHybridConfig(**_GRANITE_HYBRID, time_step_limit=(0.001, float("inf"))),
        "no limits for time steps.*0.001–inf.*--template",
    ),
    "ernie4_5_bias": (Ernie4_5Config(**_SHARED, use_bias=True), r"_proj\.bias.*--template"),
    "arcee_bias": (ArceeConfig(**_SHARED, mlp_bias=True), r"_proj\.bias.*--template"),
    "gpt_oss_tied": (GptOssConfig(**_GPT_OSS, tie_word_embeddings=True), "output head.*--template"),
    "gpt_oss_biases": (GptOssConfig(**_GPT_OSS, attention_bias=False), "biases.*--template"),
    "gpt_oss_gates": (GptOssConfig(**_GPT_OSS, swiglu_limit=5.0), "swiglu_limit.*--template"),
    "llama4_rotation": (
        Llama4TextConfig(**_LLAMA4, no_rope_layers=[1, 1, 0, 1]),
        "every fourth layer.*no_rope_layers.*--template",
    ),
    "llama4_layers": (
        Llama4TextConfig(**_LLAMA4, layer_types=["full_attention"] * 4),
        "layer_types.*--template",
    ),
    "llama4_chunks": (Llama4TextConfig(**_LLAMA4, attention_chunk_size=64), "chunks of 8192.*64.*--template"),
    "llama4_scales": (Llama4TextConfig(**_LLAMA4, floor_scale=128), "floor_scale 8192.*--template"),
    "llama4_moe_layers": (Llama4TextConfig(**_LLAMA4, moe_layers=[0, 2]), "moe_layers.*--template"),
    "llama4_norms": (Llama4TextConfig(**_LLAMA4, use_qk_norm=False), "use_qk_norm.*--template"),
    "deepseek_v2_groups": (
        DeepseekV2Config(**_DEEPSEEK, topk_method="group_limited_greedy", n_group=4, topk_group=2),
        "groups of experts.*topk_method.*--template",
    ),
    "deepseek_v2_bias": (DeepseekV2Config(**_DEEPSEEK, attention_bias=True), r"_a_proj\.bias.*--template"),
    "deepseek_v2_27_layers": (
        DeepseekV2Config(**{**_DEEPSEEK, "num_hidden_layers": 27, "first_k_dense_replace": 27}),
        "27 layers and a q_lora_rank.*--template",
    ),
    "deepseek_v3_pairs": (DeepseekV3Config(**_DEEPSEEK, rope_interleave=False), "rope_interleave.*--template"),
    "deepseek_v3_mscale": (DeepseekV3Config(**_DEEPSEEK, rope_parameters=YARN), "mscale_all_dim.*--template"),
    "deepseek_v3_rope": (DeepseekV3Config(**_DEEPSEEK, rope_parameters=LINEAR), "by YaRN or not.*--template"),
    "glm4_moe_lite_layers": (
        Glm4MoeLiteConfig(**_MLA, mlp_layer_types=["sparse", "dense", "sparse"]),
        "mlp_layer_types.*--template",
    ),
    "ernie4_5_moe_layers": (
        Ernie4_5_MoeConfig(**_ERNIE_MOE, moe_layer_end_index=1),
        "moe_layer_start_index.*--template",
    ),
    "exaone4_windows": (Exaone4Config(**_SHARED, sliding_window=32), "64 layers.*sliding_window.*--template"),
    "ministral3_mscale": (
        Ministral3Config(**{**_MINISTRAL3, "rope_parameters": {**_MINISTRAL3_ROPE, "mscale": 0.7}}),
        "mscale 1.*--template",
    ),
    "seed_oss_bias": (SeedOssConfig(**_SHARED, attention_out_bias=True), r"o_proj\.bias.*--template"),
    "cohere_query_norms": (CohereConfig(**_SHARED, use_qk_norm=True), "use_qk_norm.*--template"),
    "cohere_untied": (CohereConfig(**_SHARED, tie_word_embeddings=False), r"lm_head\.weight.*--template"),
    "nemotron_wide_heads": (NemotronConfig(**_SHARED, head_dim=32), "as wide as the model.*--template"),
    "qwen2_moe_weights": (Qwen2MoeConfig(**_QWEN2_MOE, norm_topk_prob=True), "norm_topk_prob.*--template"),
    "qwen2_moe_tied": (Qwen2MoeConfig(**_QWEN2_MOE, tie_word_embeddings=True), "output head.*--template"),
    "qwen2_moe_dense_layer": (
        Qwen2MoeConfig(**_QWEN2_MOE, mlp_only_layers=[1]),
        r"layers\.1\.mlp\.gate_proj\.weight has no place.*--template",
    ),
    "qwen3_next_weights": (Qwen3NextConfig(**_DELTA_NET_MOE, norm_topk_prob=False), "norm_topk_prob.*--template"),
    "qwen3_5_head_sizes": (
        Qwen3_5TextConfig(**{**_DELTA_NET, "linear_value_head_dim": 16}),
        "same size.*--template",
    ),
    "qwen3_5_bias": (Qwen3_5TextConfig(**_DELTA_NET, attention_bias=True), r"o_proj\.bias.*--template"),
    "bamba_conv_bias": (BambaConfig(**_BAMBA, mamba_conv_bias=False), "biases of its convolutions.*--template"),
    "bamba_width": (
        BambaConfig(**{**_BAMBA, "mamba_d_head": 64}, mamba_expand=4),
        "twice the hidden size.*have 4 times.*--template",
    ),
    "mamba2_conv_bias": (Mamba2Config(**_MAMBA2, use_conv_bias=False), "biases of its convolutions.*--template"),
    "mamba2_bias": (Mamba2Config(**_MAMBA2, use_bias=True), r"in_proj\.bias has no place.*--template"),
    "mamba2_time_steps": (
        Mamba2Config(**_MAMBA2, time_step_limit=(0.0, 0.5)),
        "no limits for time steps.*0.0–0.5.*--template",
    ),
    "nemotron_h_bias": (NemotronHConfig(**_NEMOTRON_H, use_bias=True), r"in_proj\.bias has no place.*--template"),
    "nemotron_h_mixed": (
        NemotronHConfig(
            **{**_NEMOTRON_H_MOE, "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"]}
        ),
        "in all feed-forward layers or in none.*--template",
    ),
    "hunyuan_bias": (HunYuanDenseV1Config(**_HUNYUAN, attention_bias=True), r"o_proj\.bias.*--template"),
    "lfm2_bias": (Lfm2Config(**_LFM2, conv_bias=True), r"conv\.bias has no place.*--template"),
    "lfm2_single_tokens": (Lfm2Config(**_LFM2, conv_L_cache=1), "at least two tokens.*--template"),
    "lfm2_wide_heads": (Lfm2Config(**_LFM2, head_dim=32), "as wide as the model.*--template"),
    "lfm2_moe_bias": (Lfm2MoeConfig(**_LFM2_MOE, use_expert_bias=False), "use_expert_bias.*--template"),
    "lfm2_moe_weights": (Lfm2MoeConfig(**_LFM2_MOE, norm_topk_prob=False), "norm_topk_prob.*--template"),
    "lfm2_moe_scale": (Lfm2MoeConfig(**_LFM2_MOE, routed_scaling_factor=2.5), "times 2.5.*--template"),
    "nemotron_tied": (NemotronConfig(**_SHARED, tie_word_embeddings=True), "output head.*--template"),
}
