"""One row for each built-in family: a small model of it, and the kind of tokenizer that its published models have."""

from __future__ import annotations

from dataclasses import dataclass

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
from tests.exporters.gguf.family_settings import (
    BAMBA,
    BLOOM,
    DEEPSEEK,
    DELTA_NET,
    DELTA_NET_MOE,
    ERNIE_MOE,
    FALCON,
    GEMMA,
    GEMMA3_ROPE,
    GEMMA3N,
    GEMMA3N_SHARED,
    GEMMA4,
    GEMMA4_E2B,
    GEMMA4_MOE,
    GEMMA4_ROPE,
    GLM4_MOE,
    GPT2,
    GPT_OSS,
    GRANITE,
    GRANITE_HYBRID,
    GRANITE_MOE,
    HUNYUAN,
    LFM2,
    LFM2_MOE,
    LINEAR,
    LLAMA3_ROPE,
    LLAMA4,
    LONGROPE,
    MAMBA2,
    MINISTRAL3,
    MINISTRAL3_ROPE,
    MIXTRAL,
    MLA,
    MSCALE,
    NEMOTRON_H,
    NEMOTRON_H_MOE,
    NEW_FALCON,
    OLMO3,
    OLMO3_ROPE,
    QWEN2_MOE,
    QWEN3_MOE,
    SHARED,
    TINY,
    WITHOUT_EXPERTS,
    YARN,
)


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
    "mixtral": Row(MixtralConfig(**MIXTRAL), "sentencepiece", "default"),
    "qwen2": Row(Qwen2Config(**BASE), "qwen2", "qwen2"),
    "qwen3": Row(Qwen3Config(**BASE, head_dim=128), "qwen2", "qwen2"),
    "qwen3_moe": Row(Qwen3MoeConfig(**QWEN3_MOE, norm_topk_prob=True), "qwen2", "qwen2"),
    "smollm3": Row(SmolLM3Config(**{**SHARED, "num_hidden_layers": 5}), "llama3", "llama-bpe"),
    "gpt2": Row(GPT2Config(**GPT2), "gpt2", "gpt-2"),
    "gpt_neox": Row(GPTNeoXConfig(**TINY), "gpt_neox", "gpt-2"),
    "bloom": Row(BloomConfig(**BLOOM, n_head=6), "bloom", "bloom"),  # 6 heads: ALiBi's second series of slopes
    "falcon": Row(FalconConfig(**FALCON), "falcon", "falcon"),
    "falcon_new_decoder": Row(FalconConfig(**NEW_FALCON), "falcon", "falcon"),
    "phi3": Row(Phi3Config(**SHARED), "sentencepiece", "default"),
    "gemma2": Row(Gemma2Config(**GEMMA), "gemma", "default"),
    "gemma3": Row(Gemma3TextConfig(**{**GEMMA, "num_hidden_layers": 7}), "gemma", "default"),
    "gemma3n": Row(Gemma3nTextConfig(**GEMMA3N), "gemma", "default"),
    "gemma4": Row(Gemma4TextConfig(**GEMMA4), "gemma4", None),
    "olmo2": Row(Olmo2Config(**SHARED), "olmo2", "smaug-bpe"),
    "olmo3": Row(Olmo3Config(**OLMO3), "olmo2", "smaug-bpe"),
    "granite": Row(GraniteConfig(**SHARED, **GRANITE), "single_digits", "smollm"),
    "granitemoe": Row(GraniteMoeConfig(**GRANITE_MOE), "single_digits", "smollm"),
    "granitemoeshared": Row(
        GraniteMoeSharedConfig(**GRANITE_MOE, shared_intermediate_size=128), "single_digits", "smollm"
    ),
    "granitemoehybrid": Row(GraniteMoeHybridConfig(**GRANITE_HYBRID), "llama3", "llama-bpe"),
    "ernie4_5": Row(Ernie4_5Config(**SHARED, head_dim=32), "sentencepiece", "default"),
    "glm4": Row(Glm4Config(**SHARED, head_dim=32), "llama3", "llama-bpe"),
    "gpt_oss": Row(GptOssConfig(**GPT_OSS), "gpt4o", "gpt-4o"),
    "llama4": Row(Llama4TextConfig(**LLAMA4), "gpt4o", "gpt-4o"),
    "deepseek_v2": Row(DeepseekV2Config(**DEEPSEEK), "llama3", "llama-bpe"),
    "deepseek_v3": Row(
        DeepseekV3Config(
            **DEEPSEEK, n_group=4, topk_group=2, rope_parameters={**MSCALE, "mscale": 1.0, "mscale_all_dim": 1.0}
        ),
        "llama3",
        "llama-bpe",
    ),
    "glm4_moe_lite": Row(Glm4MoeLiteConfig(**MLA), "llama3", "llama-bpe"),
    "glm4_moe": Row(Glm4MoeConfig(**GLM4_MOE), "llama3", "llama-bpe"),
    "ernie4_5_moe": Row(Ernie4_5_MoeConfig(**ERNIE_MOE), "sentencepiece", "default"),
    "ministral3": Row(Ministral3Config(**SHARED, head_dim=32, rope_parameters=MINISTRAL3_ROPE), "llama3", "llama-bpe"),
    "exaone4": Row(
        Exaone4Config(**SHARED, sliding_window=None, layer_types=["full_attention"] * 2), "llama3", "llama-bpe"
    ),
    "seed_oss": Row(SeedOssConfig(**SHARED, head_dim=32), "llama3", "llama-bpe"),
    "arcee": Row(ArceeConfig(**SHARED), "llama3", "llama-bpe"),
    "cohere": Row(CohereConfig(**SHARED, logit_scale=0.5), "single_digits", "smollm"),
    "nemotron": Row(NemotronConfig(**SHARED), "sentencepiece", "default"),
    "qwen2_moe": Row(Qwen2MoeConfig(**QWEN2_MOE, num_experts_per_tok=3), "qwen2", "qwen2"),
    "qwen3_next": Row(Qwen3NextConfig(**DELTA_NET_MOE), "qwen2", "qwen2"),
    "qwen3_5": Row(Qwen3_5TextConfig(**DELTA_NET), "qwen3_5", "qwen35"),
    "qwen3_5_moe": Row(Qwen3_5MoeTextConfig(**DELTA_NET_MOE), "qwen3_5", "qwen35"),
    "bamba": Row(BambaConfig(**BAMBA), "llama3", "llama-bpe"),
    "mamba2": Row(Mamba2Config(**MAMBA2), "gpt_neox", "gpt-2"),
    "nemotron_h": Row(NemotronHConfig(**NEMOTRON_H), "llama3", "llama-bpe"),
    "nemotron_h_moe": Row(NemotronHConfig(**NEMOTRON_H_MOE), "llama3", "llama-bpe"),
    "hunyuan_v1_dense": Row(HunYuanDenseV1Config(**HUNYUAN), "qwen2", "qwen2"),
    "lfm2": Row(Lfm2Config(**LFM2, block_multiple_of=32), "llama3", "llama-bpe"),
    "lfm2_moe": Row(Lfm2MoeConfig(**LFM2_MOE), "llama3", "llama-bpe"),
}

# Other models of these families: settings that change the metadata, the order of rows or the tensors.
VARIANTS: dict[str, PretrainedConfig] = {
    "llama_tied_with_biases": LlamaConfig(**BASE, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "llama_wide_heads": LlamaConfig(**BASE, head_dim=128),
    "llama3_rope": LlamaConfig(**BASE, rope_parameters=LLAMA3_ROPE),
    "llama_linear_rope": LlamaConfig(**BASE, rope_parameters=LINEAR),
    "mixtral_of_4": MixtralConfig(**{**MIXTRAL, "num_local_experts": 4}, num_experts_per_tok=3),
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
        **QWEN3_MOE, norm_topk_prob=True, mrope_section=[6, 5, 5], num_deepstack_layers=3
    ),
    "smollm3_yarn": SmolLM3Config(**{**SHARED, "num_hidden_layers": 5}, rope_parameters=YARN),
    "gpt2_narrow_feed_forward": GPT2Config(**GPT2, n_inner=96),
    "gpt_neox_sequential": GPTNeoXConfig(**TINY, use_parallel_residual=False),
    "gpt_neox_half_rotated": GPTNeoXConfig(**TINY, rope_parameters={**YARN, "partial_rotary_factor": 0.5}),
    "bloom_8_heads": BloomConfig(**BLOOM, n_head=8),
    "falcon_multi_head": FalconConfig(**FALCON, multi_query=False),
    "falcon_one_norm": FalconConfig(**NEW_FALCON, num_ln_in_parallel_attn=1),
    "phi3_partial_rotary": Phi3Config(
        **SHARED, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}
    ),
    "phi3_tied": Phi3Config(**SHARED, tie_word_embeddings=True),
    "gemma2_window_period_3": Gemma2Config(
        **{**GEMMA, "num_hidden_layers": 4},
        layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
    ),
    "gemma3_window_period_2": Gemma3TextConfig(
        **{**GEMMA, "num_hidden_layers": 4}, layer_types=["sliding_attention", "full_attention"] * 2
    ),
    "gemma3_without_windows": Gemma3TextConfig(**GEMMA, layer_types=["full_attention"] * 2),
    "gemma3_rope": Gemma3TextConfig(**{**GEMMA, "num_hidden_layers": 7}, rope_parameters=GEMMA3_ROPE),
    "gemma3_soft_cap": Gemma3TextConfig(**GEMMA, final_logit_softcapping=5.0),
    "gemma3n_shared": Gemma3nTextConfig(**GEMMA3N_SHARED),
    "gemma4_e2b": Gemma4TextConfig(**GEMMA4_E2B, num_kv_shared_layers=2, use_double_wide_mlp=True),
    "gemma4_moe": Gemma4TextConfig(**GEMMA4, **GEMMA4_MOE),
    "gemma4_keys_as_values": Gemma4TextConfig(
        **GEMMA4, attention_k_eq_v=True, num_global_key_value_heads=1, final_logit_softcapping=5.0
    ),
    "gemma4_rope": Gemma4TextConfig(**GEMMA4, rope_parameters=GEMMA4_ROPE),
    "olmo2_yarn": Olmo2Config(**SHARED, rope_parameters=YARN),
    "olmo3_yarn_window_period_2": Olmo3Config(
        **{**OLMO3, "num_hidden_layers": 4},
        rope_parameters=OLMO3_ROPE,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
    "olmo3_without_windows": Olmo3Config(**OLMO3, layer_types=["full_attention"] * 5),
    "granite_tied_with_biases": GraniteConfig(
        **SHARED, **GRANITE, tie_word_embeddings=True, attention_bias=True, mlp_bias=True
    ),
    "granite_llama3_rope": GraniteConfig(**SHARED, **GRANITE, rope_parameters=LLAMA3_ROPE),
    "granitemoehybrid_dense": GraniteMoeHybridConfig(
        **{**GRANITE_HYBRID, **WITHOUT_EXPERTS}, position_embedding_type="rope", attention_bias=True
    ),
    "granitemoehybrid_without_mamba": GraniteMoeHybridConfig(
        **{**GRANITE_HYBRID, **WITHOUT_EXPERTS, "layer_types": ["full_attention"] * 3},
        position_embedding_type="rope",
        tie_word_embeddings=True,
    ),
    "granitemoehybrid_experts_without_mamba": GraniteMoeHybridConfig(
        **{**GRANITE_HYBRID, "layer_types": ["full_attention"] * 3}, position_embedding_type="rope"
    ),
    "ernie4_5_untied": Ernie4_5Config(**SHARED, head_dim=16, tie_word_embeddings=False),
    "glm4_without_biases": Glm4Config(**SHARED, head_dim=16, attention_bias=False, tie_word_embeddings=True),
    "arcee_wide_heads": ArceeConfig(**SHARED, head_dim=32, rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True),
    "arcee_yarn": ArceeConfig(**SHARED, rope_parameters=YARN),
    "cohere_query_norms": CohereConfig(
        **{**SHARED, "num_hidden_layers": 64, "initializer_range": 0.1}, use_qk_norm=True
    ),
    "gpt_oss_windows": GptOssConfig(
        **{**GPT_OSS, "num_hidden_layers": 3},
        layer_types=["full_attention", "sliding_attention", "sliding_attention"],
    ),
    "llama4_rope": Llama4TextConfig(
        **LLAMA4, rope_parameters={**LLAMA3_ROPE, "high_freq_factor": 1.0}, tie_word_embeddings=True
    ),
    "deepseek_v2_lite": DeepseekV2Config(**{**DEEPSEEK, "q_lora_rank": None}, rope_parameters=MSCALE),
    "deepseek_v3_one_group": DeepseekV3Config(**DEEPSEEK, n_group=1, topk_group=1, norm_topk_prob=False),
    "glm4_moe_lite_two_dense": Glm4MoeLiteConfig(
        **MLA, mlp_layer_types=["dense", "dense", "sparse"], tie_word_embeddings=True
    ),
    "glm4_moe_norms": Glm4MoeConfig(
        **GLM4_MOE, use_qk_norm=True, attention_bias=True, n_group=4, topk_group=2, norm_topk_prob=False
    ),
    "ernie4_5_moe_unshared": Ernie4_5_MoeConfig(**{**ERNIE_MOE, "moe_num_shared_experts": 0}, moe_layer_start_index=2),
    "exaone4_of_64_layers": Exaone4Config(
        **{**SHARED, "num_hidden_layers": 64, "initializer_range": 0.1}, sliding_window=32, rope_parameters=LLAMA3_ROPE
    ),
    "seed_oss_yarn": SeedOssConfig(**SHARED, head_dim=16, rope_parameters=YARN, tie_word_embeddings=True),
    "nemotron_with_biases": NemotronConfig(**SHARED, attention_bias=True, mlp_bias=True),
    "qwen2_moe_without_biases": Qwen2MoeConfig(**QWEN2_MOE, num_experts_per_tok=3, qkv_bias=False),
    "qwen3_next_more_value_heads": Qwen3NextConfig(**{**DELTA_NET_MOE, "linear_num_value_heads": 4}),
    "qwen3_5_more_value_heads": Qwen3_5TextConfig(**{**DELTA_NET, "linear_num_value_heads": 6}),
    "qwen3_5_other_layers": Qwen3_5TextConfig(
        **{**DELTA_NET, "layer_types": ["full_attention", "linear_attention", "linear_attention"]},
        rope_parameters={**YARN, "partial_rotary_factor": 0.5},
        tie_word_embeddings=True,
    ),
    "bamba_tied_with_biases": BambaConfig(**BAMBA, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "mamba2_tied": Mamba2Config(**MAMBA2, tie_word_embeddings=True, conv_kernel=3),
    "nemotron_h_with_biases": NemotronHConfig(**NEMOTRON_H, mlp_bias=True, tie_word_embeddings=True),
    "nemotron_h_moe_groups": NemotronHConfig(
        **{**NEMOTRON_H_MOE, "norm_topk_prob": False},
        n_group=2,
        moe_latent_size=32,
        routed_scaling_factor=2.5,
    ),
    "hunyuan_alpha": HunYuanDenseV1Config(
        **HUNYUAN, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "alpha": 50.0, "factor": 1.0}
    ),
    "hunyuan_tied_yarn": HunYuanDenseV1Config(**HUNYUAN, tie_word_embeddings=True, rope_parameters=YARN),
    "lfm2_untied": Lfm2Config(**LFM2, conv_L_cache=4, block_auto_adjust_ff_dim=False, tie_word_embeddings=False),
}

LONG_PHI3 = Phi3Config(
    **{**SHARED, "max_position_embeddings": 1024, "original_max_position_embeddings": 256}, rope_parameters=LONGROPE
)

# (config, what the refusal says). llama.cpp would compute something else, or not load the file.
REFUSED: dict[str, tuple[PretrainedConfig, str]] = {
    "activation": (LlamaConfig(**BASE, hidden_act="gelu"), "gelu.*--template"),
    "output_bias": (Qwen3Config(**BASE, head_dim=64, attention_bias=True), r"o_proj\.bias.*--template"),
    "qwen3_moe_weights": (Qwen3MoeConfig(**QWEN3_MOE, norm_topk_prob=False), "norm_topk_prob.*--template"),
    "qwen3_moe_dense_layer": (
        Qwen3MoeConfig(**QWEN3_MOE, norm_topk_prob=True, mlp_only_layers=[1]),
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
    "smollm3_bias": (SmolLM3Config(**SHARED, attention_bias=True), r"o_proj\.bias.*--template"),
    "smollm3_no_rope": (SmolLM3Config(**SHARED, no_rope_layers=[0, 1]), "every fourth layer.*--template"),
    "gpt2_scale": (GPT2Config(**GPT2, scale_attn_by_inverse_layer_idx=True), "scale_attn.*--template"),
    "gpt2_activation": (GPT2Config(**GPT2, activation_function="relu"), "gelu_new.*relu.*--template"),
    "gpt_neox_tied": (GPTNeoXConfig(**TINY, tie_word_embeddings=True), "output head.*--template"),
    "gpt_neox_biases": (GPTNeoXConfig(**TINY, attention_bias=False), "biases.*--template"),
    "bloom_residual": (
        BloomConfig(**BLOOM, n_head=8, apply_residual_connection_post_layernorm=True),
        "residual.*--template",
    ),
    "falcon_alibi": (FalconConfig(**FALCON, alibi=True), "ALiBi.*--template"),
    "falcon_sequential": (FalconConfig(**FALCON, parallel_attn=False), r"side by side.*--template"),
    "falcon_bias": (FalconConfig(**FALCON, bias=True), "biases.*--template"),
    "gemma2_soft_cap": (Gemma2Config(**GEMMA, attn_logit_softcapping=None), "soft caps.*--template"),
    "gemma2_scale": (
        Gemma2Config(**{**GEMMA, "query_pre_attn_scalar": 16}),
        "scales attention by 32 .* this model by 16.*--template",
    ),
    "gemma2_no_windows": (Gemma2Config(**GEMMA, layer_types=["full_attention"] * 2), "windows.*--template"),
    "gemma3_layers": (
        Gemma3TextConfig(**GEMMA, layer_types=["full_attention", "sliding_attention"]),
        "layer_types.*--template",
    ),
    "gemma3_bias": (Gemma3TextConfig(**GEMMA, attention_bias=True), r"_proj\.bias.*--template"),
    "gemma3n_laurel": (Gemma3nTextConfig(**GEMMA3N, laurel_rank=32), "laurel_rank 64.*32.*--template"),
    "gemma3n_shared": (
        Gemma3nTextConfig(**{**GEMMA3N, "num_kv_shared_layers": 1}),
        "first 20 layers.*first 2.*--template",
    ),
    "gemma3n_sparsity": (
        Gemma3nTextConfig(**{**GEMMA3N, "activation_sparsity_pattern": [0.95, 0.0, 0.0]}),
        "5 % of the gates.*--template",
    ),
    "gemma4_shared": (
        Gemma4TextConfig(
            **{
                **GEMMA4_E2B,
                "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
            },
            num_kv_shared_layers=1,
        ),
        "last two layers that have their own.*--template",
    ),
    "gemma4_bias": (Gemma4TextConfig(**GEMMA4, attention_bias=True), r"_proj\.bias.*--template"),
    "olmo2_tied": (Olmo2Config(**SHARED, tie_word_embeddings=True), "output head.*--template"),
    "olmo2_wide_heads": (Olmo2Config(**SHARED, head_dim=32), "as wide as the model.*--template"),
    "olmo2_bias": (Olmo2Config(**SHARED, attention_bias=True), r"_proj\.bias.*--template"),
    "olmo3_layers": (
        Olmo3Config(**OLMO3, layer_types=["full_attention", *["sliding_attention"] * 4]),
        "layer_types.*--template",
    ),
    "olmo3_window_theta": (
        Olmo3Config(
            **OLMO3,
            rope_parameters={**OLMO3_ROPE, "sliding_attention": {"rope_type": "default", "rope_theta": 500.0}},
        ),
        "one rope_theta.*--template",
    ),
    "olmo3_window_scaling": (
        Olmo3Config(**OLMO3, rope_parameters={**OLMO3_ROPE, "sliding_attention": LINEAR}),
        "unscaled rotation.*--template",
    ),
    "granitemoehybrid_bias": (
        GraniteMoeHybridConfig(**GRANITE_HYBRID, mamba_proj_bias=True),
        r"mamba\.in_proj\.bias has no place.*--template",
    ),
    "granitemoehybrid_conv_bias": (
        GraniteMoeHybridConfig(**GRANITE_HYBRID, mamba_conv_bias=False),
        "biases of its convolutions.*--template",
    ),
    "granitemoehybrid_width": (
        GraniteMoeHybridConfig(**{**GRANITE_HYBRID, "mamba_d_head": 64}, mamba_expand=4),
        "twice the hidden size.*have 4 times.*--template",
    ),
    "granitemoehybrid_positions": (
        GraniteMoeHybridConfig(**{**GRANITE_HYBRID, "layer_types": ["full_attention"] * 3}),
        "granitemoe has rotary positions.*--template",
    ),
    "granitemoehybrid_time_steps": (
        GraniteMoeHybridConfig(**GRANITE_HYBRID, time_step_limit=(0.001, float("inf"))),
        "no limits for time steps.*0.001–inf.*--template",
    ),
    "ernie4_5_bias": (Ernie4_5Config(**SHARED, use_bias=True), r"_proj\.bias.*--template"),
    "arcee_bias": (ArceeConfig(**SHARED, mlp_bias=True), r"_proj\.bias.*--template"),
    "gpt_oss_tied": (GptOssConfig(**GPT_OSS, tie_word_embeddings=True), "output head.*--template"),
    "gpt_oss_biases": (GptOssConfig(**GPT_OSS, attention_bias=False), "biases.*--template"),
    "gpt_oss_gates": (GptOssConfig(**GPT_OSS, swiglu_limit=5.0), "swiglu_limit.*--template"),
    "llama4_rotation": (
        Llama4TextConfig(**LLAMA4, no_rope_layers=[1, 1, 0, 1]),
        "every fourth layer.*no_rope_layers.*--template",
    ),
    "llama4_layers": (
        Llama4TextConfig(**LLAMA4, layer_types=["full_attention"] * 4),
        "layer_types.*--template",
    ),
    "llama4_chunks": (Llama4TextConfig(**LLAMA4, attention_chunk_size=64), "chunks of 8192.*64.*--template"),
    "llama4_scales": (Llama4TextConfig(**LLAMA4, floor_scale=128), "floor_scale 8192.*--template"),
    "llama4_moe_layers": (Llama4TextConfig(**LLAMA4, moe_layers=[0, 2]), "moe_layers.*--template"),
    "llama4_norms": (Llama4TextConfig(**LLAMA4, use_qk_norm=False), "use_qk_norm.*--template"),
    "deepseek_v2_groups": (
        DeepseekV2Config(**DEEPSEEK, topk_method="group_limited_greedy", n_group=4, topk_group=2),
        "groups of experts.*topk_method.*--template",
    ),
    "deepseek_v2_bias": (DeepseekV2Config(**DEEPSEEK, attention_bias=True), r"_a_proj\.bias.*--template"),
    "deepseek_v2_27_layers": (
        DeepseekV2Config(**{**DEEPSEEK, "num_hidden_layers": 27, "first_k_dense_replace": 27}),
        "27 layers and a q_lora_rank.*--template",
    ),
    "deepseek_v3_pairs": (DeepseekV3Config(**DEEPSEEK, rope_interleave=False), "rope_interleave.*--template"),
    "deepseek_v3_mscale": (DeepseekV3Config(**DEEPSEEK, rope_parameters=YARN), "mscale_all_dim.*--template"),
    "deepseek_v3_rope": (DeepseekV3Config(**DEEPSEEK, rope_parameters=LINEAR), "by YaRN or not.*--template"),
    "glm4_moe_lite_layers": (
        Glm4MoeLiteConfig(**MLA, mlp_layer_types=["sparse", "dense", "sparse"]),
        "mlp_layer_types.*--template",
    ),
    "ernie4_5_moe_layers": (
        Ernie4_5_MoeConfig(**ERNIE_MOE, moe_layer_end_index=1),
        "moe_layer_start_index.*--template",
    ),
    "exaone4_windows": (Exaone4Config(**SHARED, sliding_window=32), "64 layers.*sliding_window.*--template"),
    "ministral3_mscale": (
        Ministral3Config(**{**MINISTRAL3, "rope_parameters": {**MINISTRAL3_ROPE, "mscale": 0.7}}),
        "mscale 1.*--template",
    ),
    "seed_oss_bias": (SeedOssConfig(**SHARED, attention_out_bias=True), r"o_proj\.bias.*--template"),
    "cohere_query_norms": (CohereConfig(**SHARED, use_qk_norm=True), "use_qk_norm.*--template"),
    "cohere_untied": (CohereConfig(**SHARED, tie_word_embeddings=False), r"lm_head\.weight.*--template"),
    "nemotron_wide_heads": (NemotronConfig(**SHARED, head_dim=32), "as wide as the model.*--template"),
    "qwen2_moe_weights": (Qwen2MoeConfig(**QWEN2_MOE, norm_topk_prob=True), "norm_topk_prob.*--template"),
    "qwen2_moe_tied": (Qwen2MoeConfig(**QWEN2_MOE, tie_word_embeddings=True), "output head.*--template"),
    "qwen2_moe_dense_layer": (
        Qwen2MoeConfig(**QWEN2_MOE, mlp_only_layers=[1]),
        r"layers\.1\.mlp\.gate_proj\.weight has no place.*--template",
    ),
    "qwen3_next_weights": (Qwen3NextConfig(**DELTA_NET_MOE, norm_topk_prob=False), "norm_topk_prob.*--template"),
    "qwen3_5_head_sizes": (
        Qwen3_5TextConfig(**{**DELTA_NET, "linear_value_head_dim": 16}),
        "same size.*--template",
    ),
    "qwen3_5_bias": (Qwen3_5TextConfig(**DELTA_NET, attention_bias=True), r"o_proj\.bias.*--template"),
    "bamba_conv_bias": (BambaConfig(**BAMBA, mamba_conv_bias=False), "biases of its convolutions.*--template"),
    "bamba_width": (
        BambaConfig(**{**BAMBA, "mamba_d_head": 64}, mamba_expand=4),
        "twice the hidden size.*have 4 times.*--template",
    ),
    "mamba2_conv_bias": (Mamba2Config(**MAMBA2, use_conv_bias=False), "biases of its convolutions.*--template"),
    "mamba2_bias": (Mamba2Config(**MAMBA2, use_bias=True), r"in_proj\.bias has no place.*--template"),
    "mamba2_time_steps": (
        Mamba2Config(**MAMBA2, time_step_limit=(0.0, 0.5)),
        "no limits for time steps.*0.0–0.5.*--template",
    ),
    "nemotron_h_bias": (NemotronHConfig(**NEMOTRON_H, use_bias=True), r"in_proj\.bias has no place.*--template"),
    "nemotron_h_mixed": (
        NemotronHConfig(
            **{**NEMOTRON_H_MOE, "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"]}
        ),
        "in all feed-forward layers or in none.*--template",
    ),
    "hunyuan_bias": (HunYuanDenseV1Config(**HUNYUAN, attention_bias=True), r"o_proj\.bias.*--template"),
    "lfm2_bias": (Lfm2Config(**LFM2, conv_bias=True), r"conv\.bias has no place.*--template"),
    "lfm2_single_tokens": (Lfm2Config(**LFM2, conv_L_cache=1), "at least two tokens.*--template"),
    "lfm2_wide_heads": (Lfm2Config(**LFM2, head_dim=32), "as wide as the model.*--template"),
    "lfm2_moe_bias": (Lfm2MoeConfig(**LFM2_MOE, use_expert_bias=False), "use_expert_bias.*--template"),
    "lfm2_moe_weights": (Lfm2MoeConfig(**LFM2_MOE, norm_topk_prob=False), "norm_topk_prob.*--template"),
    "lfm2_moe_scale": (Lfm2MoeConfig(**LFM2_MOE, routed_scaling_factor=2.5), "times 2.5.*--template"),
    "nemotron_tied": (NemotronConfig(**SHARED, tie_word_embeddings=True), "output head.*--template"),
}
