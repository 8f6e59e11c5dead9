"""Small random models of the families that people deploy: hidden 128, four layers, 3,072 tokens, some hundred kB.

Saved by transformers itself, so that names are those of published checkpoints (`model.language_model.…`,
`block_sparse_moe.…`, fused experts). What llama.cpp has as a constant is as in published models: Gemma 3n's sizes and
number of layers, Llama 4's chunks, Phi's feed-forward width; and so are Qwen-VL's epsilon and the rule of its sections.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from signround_edge.demo import tiny_llama_path

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")

Config = dict[str, Any]


@dataclass(frozen=True)
class SmallModel:
    """One row: what `AutoConfig.for_model` is given, and whether the model reads images, too."""

    model_type: str
    config: Config
    reads_images: bool = False


def _base(*without: str, **changed: Any) -> Config:
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


def _default_rope(theta: float = 1e4, **more: Any) -> Config:
    return {"rope_type": "default", "rope_theta": theta, **more}


_HD = "head_dim"
_UNSCALED = ("Gemma3nTextAttention", "Gemma4TextAttention")  # softmax of q·k as it is
_EVERY_SECOND_FULL = ["sliding_attention", "full_attention"] * 2
_EVERY_SECOND_LINEAR = ["linear_attention", "full_attention"] * 2
_EVERY_SECOND_CONV = ["conv", "full_attention"] * 2
_EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
_SHARED_EXPERT = {**_EXPERTS, "shared_expert_intermediate_size": 128}
_MIXTRAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
_TWO_ROPES = {"sliding_attention": _default_rope(), "full_attention": _default_rope(1e6)}
_GEMMA4_ROPES = {
    "sliding_attention": _default_rope(),
    "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
}
_DELTA_NET = {
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    "rope_parameters": _default_rope(partial_rotary_factor=0.25),
    "head_dim": 64,
}
_MLA_HEADS = {
    "kv_lora_rank": 64,
    "q_lora_rank": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "qk_nope_head_dim": 32,
    "num_key_value_heads": 4,
}
_GROUPED_EXPERTS = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "n_group": 1,
    "topk_group": 1,
}
_DEEPSEEK = {**_MLA_HEADS, **_GROUPED_EXPERTS, "first_k_dense_replace": 1}
_MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 32,
    "mamba_n_groups": 1,
    "mamba_d_state": 32,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_chunk_size": 32,
}
_NEMOTRON_H = {
    "mamba_num_heads": 8,
    "mamba_head_dim": 32,
    "n_groups": 1,
    "ssm_state_size": 32,
    "chunk_size": 32,
    "expand": 2,
    "pad_token_id": 1,
}
_GRANITE = {
    "embedding_multiplier": 12.0,
    "logits_scaling": 8.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.0156,
}
_GEMMA3 = _base(
    query_pre_attn_scalar=32,
    sliding_window=16,
    layer_types=_EVERY_SECOND_FULL,
    rope_parameters=_TWO_ROPES,
    tie_word_embeddings=True,
)
_GEMMA3N = _base(
    num_hidden_layers=22,
    vocab_size_per_layer_input=3072,
    hidden_size_per_layer_input=256,
    laurel_rank=64,
    num_kv_shared_layers=2,
    altup_num_inputs=4,
    sliding_window=16,
    layer_types=["sliding_attention", "full_attention"] * 11,
    rope_parameters=_TWO_ROPES,
    activation_sparsity_pattern=[0.95] * 10 + [0.0] * 12,
    intermediate_size=[2048] * 22,
    pad_token_id=1,
)
_GEMMA4 = _base(
    hidden_activation="gelu_pytorch_tanh",
    rope_parameters=_GEMMA4_ROPES,
    sliding_window=16,
    layer_types=_EVERY_SECOND_FULL,
    tie_word_embeddings=True,
    vocab_size_per_layer_input=3072,
    hidden_size_per_layer_input=32,
    num_kv_shared_layers=2,
    pad_token_id=1,
    per_layer_config={"01": {"head_dim": 64}, "03": {"head_dim": 64}},
)
_GEMMA4_OWN_KEYS = {**_GEMMA4, "num_kv_shared_layers": 0}
_GEMMA4_PLAIN = {**_GEMMA4_OWN_KEYS, "hidden_size_per_layer_input": 0}
_SIGLIP = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 64,
    "patch_size": 16,
}
_QWEN_VISION = {
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
_QWEN_TOKENS = {
    "image_token_id": 3000,
    "video_token_id": 3001,
    "vision_start_token_id": 3002,
    "vision_end_token_id": 3003,
}
_MROPE = _default_rope(mrope_section=[4, 6, 6])
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "partial_rotary_factor": 0.75,
    "long_factor": [2.0] * 12,
    "short_factor": [1.0] * 12,
    "original_max_position_embeddings": 256,
}

MODELS: dict[str, SmallModel] = {
    "llama": SmallModel("llama", _base()),
    "mistral": SmallModel("mistral", _base(sliding_window=None)),
    "mistral_window": SmallModel("mistral", _base(sliding_window=16)),
    "ministral": SmallModel("ministral", _base(sliding_window=16, layer_types=_EVERY_SECOND_FULL)),
    "mistral3_mm": SmallModel(
        "mistral3",
        {
            "text_config": {**_base(pad_token_id=1), "model_type": "mistral"},
            "vision_config": {**_SIGLIP, "model_type": "pixtral", "head_dim": 32},
            "image_token_index": 3000,
            "tie_word_embeddings": False,
        },
        True,
    ),
    "mixtral": SmallModel("mixtral", _base(_HD, **_MIXTRAL, sliding_window=None)),
    "qwen2": SmallModel("qwen2", _base(_HD, tie_word_embeddings=True)),
    "qwen2_moe": SmallModel("qwen2_moe", _base(_HD, **_SHARED_EXPERT)),
    "qwen3": SmallModel("qwen3", _base(tie_word_embeddings=True)),
    "qwen3_moe": SmallModel("qwen3_moe", _base(**_EXPERTS, decoder_sparse_step=1)),
    "qwen3_moe_norm": SmallModel("qwen3_moe", _base(**_EXPERTS, decoder_sparse_step=1, norm_topk_prob=True)),
    "qwen3_next": SmallModel("qwen3_next", _base(**{**_DELTA_NET, **_SHARED_EXPERT})),
    "qwen3_5_text": SmallModel("qwen3_5_text", _base(**_DELTA_NET, tie_word_embeddings=True)),
    "qwen3_5_more_value_heads": SmallModel(
        "qwen3_5_text", _base(**{**_DELTA_NET, "linear_num_value_heads": 8}, tie_word_embeddings=True)
    ),
    "qwen3_5_moe_text": SmallModel("qwen3_5_moe_text", _base(**{**_DELTA_NET, **_SHARED_EXPERT})),
    "qwen3_5_mm": SmallModel(
        "qwen3_5", {"text_config": _base(**_DELTA_NET), "vision_config": _QWEN_VISION, **_QWEN_TOKENS}, True
    ),
    "qwen2_vl": SmallModel(
        "qwen2_vl",
        {
            "text_config": _base(_HD, rope_parameters=_MROPE, rms_norm_eps=1e-6),
            "vision_config": {"depth": 2, "embed_dim": 64, "hidden_size": 128, "num_heads": 2, "patch_size": 14},
            **_QWEN_TOKENS,
        },
        True,
    ),
    "qwen2_5_vl": SmallModel(
        "qwen2_5_vl",
        {
            "text_config": _base(_HD, rope_parameters=_MROPE, rms_norm_eps=1e-6),
            "vision_config": {
                "depth": 2,
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_heads": 2,
                "out_hidden_size": 128,
                "fullatt_block_indexes": [1],
            },
            **_QWEN_TOKENS,
        },
        True,
    ),
    "qwen3_vl": SmallModel(
        "qwen3_vl",
        {
            "text_config": _base(rope_parameters=_default_rope(mrope_section=[6, 5, 5], mrope_interleaved=True)),
            "vision_config": {**_QWEN_VISION, "deepstack_visual_indexes": [0]},
            **_QWEN_TOKENS,
        },
        True,
    ),
    "gemma2": SmallModel("gemma2", _base(query_pre_attn_scalar=32, sliding_window=16, layer_types=_EVERY_SECOND_FULL)),
    "gemma3_text": SmallModel("gemma3_text", _GEMMA3),
    "gemma3_mm": SmallModel(
        "gemma3",
        {
            "text_config": _GEMMA3,
            "vision_config": _SIGLIP,
            "mm_tokens_per_image": 4,
            "boi_token_index": 3000,
            "eoi_token_index": 3001,
            "image_token_index": 3002,
        },
        True,
    ),
    "gemma3n_text": SmallModel("gemma3n_text", _GEMMA3N),
    "gemma3n_text_nosharing": SmallModel(
        "gemma3n_text",
        {
            **_GEMMA3N,
            "num_hidden_layers": 20,
            "num_kv_shared_layers": 0,
            "layer_types": _GEMMA3N["layer_types"][:20],
            "activation_sparsity_pattern": _GEMMA3N["activation_sparsity_pattern"][:20],
            "intermediate_size": [2048] * 20,
        },
    ),
    "gemma4_text_plain": SmallModel("gemma4_text", _GEMMA4_PLAIN),
    "gemma4_text_k_eq_v": SmallModel("gemma4_text", {**_GEMMA4_PLAIN, "attention_k_eq_v": True}),
    "gemma4_text_ple_only": SmallModel("gemma4_text", _GEMMA4_OWN_KEYS),
    "gemma4_text_E2B": SmallModel("gemma4_text", _GEMMA4),
    "gemma4_text_E2B_no_ple": SmallModel("gemma4_text", {**_GEMMA4, "hidden_size_per_layer_input": 0}),
    "gemma4_text_moe": SmallModel(
        "gemma4_text",
        {**_GEMMA4_PLAIN, "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 128},
    ),
    "gemma4_mm": SmallModel(
        "gemma4",
        {
            "text_config": _GEMMA4,
            "audio_config": None,
            "vision_config": {
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "head_dim": 32,
            },
            "boi_token_id": 3000,
            "eoi_token_id": 3001,
            "image_token_id": 3002,
            "video_token_id": 3003,
            "boa_token_id": 3004,
            "eoa_token_index": 3005,
            "audio_token_id": 3006,
        },
        True,
    ),
    "phi": SmallModel("phi", _base(_HD, num_key_value_heads=4, intermediate_size=512)),
    "phi3": SmallModel("phi3", _base(_HD, original_max_position_embeddings=512, pad_token_id=1)),
    "phi4_mini": SmallModel(
        "phi3",
        _base(
            _HD,
            original_max_position_embeddings=256,
            pad_token_id=1,
            tie_word_embeddings=True,
            rope_parameters=_LONGROPE,
        ),
    ),
    "phimoe": SmallModel("phimoe", _base(_HD, **_MIXTRAL)),
    "lfm2": SmallModel(
        "lfm2",
        _base(_HD, layer_types=_EVERY_SECOND_CONV, block_auto_adjust_ff_dim=False, conv_L_cache=3, pad_token_id=1),
    ),
    "lfm2_moe": SmallModel(
        "lfm2_moe",
        _base(
            _HD,
            layer_types=_EVERY_SECOND_CONV,
            num_dense_layers=1,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=128,
            pad_token_id=1,
        ),
    ),
    "lfm3": SmallModel(
        "lfm3",
        _base(layer_types=["conv", "full_attention", "conv", "sliding_attention"], sliding_window=16, pad_token_id=1),
    ),
    "smollm3": SmallModel("smollm3", _base(no_rope_layers=[1, 1, 1, 0], pad_token_id=1)),
    "smolvlm": SmallModel(
        "smolvlm",
        {
            "text_config": {**_base(), "model_type": "llama"},
            "vision_config": _SIGLIP,
            "image_token_id": 3000,
            "pad_token_id": 1,
        },
        True,
    ),
    "gpt_oss": SmallModel(
        "gpt_oss", _base(**_MIXTRAL, sliding_window=16, layer_types=_EVERY_SECOND_FULL, intermediate_size=128)
    ),
    "llama4_text": SmallModel(
        "llama4_text",
        _base(
            intermediate_size=128,
            intermediate_size_mlp=256,
            num_local_experts=4,
            num_experts_per_tok=1,
            interleave_moe_layer_step=2,
            no_rope_layers=[1, 1, 1, 0],
            attention_chunk_size=8192,
            pad_token_id=1,
        ),
    ),
    "deepseek_v2": SmallModel("deepseek_v2", _base(_HD, **_DEEPSEEK)),
    "deepseek_v2_lite": SmallModel("deepseek_v2", _base(_HD, **{**_DEEPSEEK, "q_lora_rank": None})),
    "deepseek_v3": SmallModel("deepseek_v3", _base(_HD, **_DEEPSEEK, num_nextn_predict_layers=0)),
    "glm4": SmallModel("glm4", _base(rope_parameters=_default_rope(partial_rotary_factor=0.5))),
    "glm4_moe_lite": SmallModel(
        "glm4_moe_lite",
        _base(_HD, **_MLA_HEADS, **_GROUPED_EXPERTS, mlp_layer_types=["dense", "sparse", "sparse", "sparse"]),
    ),
    "granite": SmallModel("granite", _base(_HD, **_GRANITE)),
    "granitemoe": SmallModel("granitemoe", _base(_HD, **_MIXTRAL, **_GRANITE, intermediate_size=128)),
    "granitemoehybrid_moe": SmallModel(
        "granitemoehybrid",
        _base(
            _HD,
            **_MIXTRAL,
            **_MAMBA,
            intermediate_size=128,
            shared_intermediate_size=128,
            layer_types=_EVERY_SECOND_LINEAR,
            position_embedding_type="nope",
        ),
    ),
    "granitemoehybrid_dense": SmallModel(
        "granitemoehybrid",
        _base(
            _HD,
            **_MAMBA,
            num_local_experts=0,
            num_experts_per_tok=0,
            shared_intermediate_size=256,
            layer_types=_EVERY_SECOND_LINEAR,
            position_embedding_type="rope",
        ),
    ),
    "bamba": SmallModel("bamba", _base(_HD, attn_layer_indices=[1, 3], pad_token_id=1, **_MAMBA)),
    "mamba2": SmallModel(
        "mamba2",
        {
            "num_heads": 8,
            "head_dim": 32,
            "vocab_size": 3072,
            "hidden_size": 128,
            "state_size": 32,
            "num_hidden_layers": 4,
            "expand": 2,
            "n_groups": 1,
            "chunk_size": 32,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 1,
        },
    ),
    "nemotron": SmallModel("nemotron", _base()),
    "nemotron_h": SmallModel(
        "nemotron_h",
        _base(
            "num_hidden_layers", **_NEMOTRON_H, layers_block_type=["linear_attention", "mlp", "full_attention", "mlp"]
        ),
    ),
    "nemotron_h_moe": SmallModel(
        "nemotron_h",
        _base(
            "num_hidden_layers",
            **_NEMOTRON_H,
            layers_block_type=["linear_attention", "moe", "full_attention", "moe"],
            n_routed_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=128,
            moe_shared_expert_intermediate_size=128,
        ),
    ),
    "olmo2": SmallModel("olmo2", _base(_HD)),
    "olmo3": SmallModel("olmo3", _base(_HD, sliding_window=16, layer_types=_EVERY_SECOND_FULL)),
    "ernie4_5": SmallModel("ernie4_5", _base()),
    "hunyuan_v1_dense": SmallModel("hunyuan_v1_dense", _base()),
    "minicpm3": SmallModel("minicpm3", _base(_HD, **_MLA_HEADS)),
    "cohere": SmallModel("cohere", _base(_HD)),
    "arcee": SmallModel("arcee", _base()),
    "internlm3": SmallModel("internlm3", _base(pad_token_id=1)),
    "opt": SmallModel(
        "opt",
        {
            "vocab_size": 3072,
            "hidden_size": 128,
            "num_hidden_layers": 4,
            "ffn_dim": 256,
            "num_attention_heads": 4,
            "max_position_embeddings": 512,
            "word_embed_proj_dim": 128,
            "bos_token_id": 0,
            "eos_token_id": 1,
        },
    ),
    "bloom": SmallModel(
        "bloom",
        {"vocab_size": 3072, "hidden_size": 128, "n_layer": 4, "n_head": 4, "bos_token_id": 0, "eos_token_id": 1},
    ),
    "gpt2": SmallModel(
        "gpt2",
        {
            "vocab_size": 3072,
            "n_positions": 512,
            "n_embd": 128,
            "n_layer": 4,
            "n_head": 4,
            "bos_token_id": 0,
            "eos_token_id": 1,
        },
    ),
    "gpt_neox": SmallModel(
        "gpt_neox",
        {
            "vocab_size": 3072,
            "hidden_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "intermediate_size": 256,
            "max_position_embeddings": 512,
            "bos_token_id": 0,
            "eos_token_id": 1,
        },
    ),
    "mpt": SmallModel("mpt", {"d_model": 128, "n_heads": 4, "n_layers": 4, "max_seq_len": 512, "vocab_size": 3072}),
    "t5": SmallModel(
        "t5",
        {
            "vocab_size": 3072,
            "d_model": 128,
            "d_kv": 32,
            "d_ff": 256,
            "num_layers": 2,
            "num_decoder_layers": 2,
            "num_heads": 4,
        },
    ),
    # Not in the list that the figures of the issue count.
    "falcon": SmallModel(
        "falcon", {"vocab_size": 3072, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    ),
    "gemma": SmallModel("gemma", _base(tie_word_embeddings=True)),
    "exaone4": SmallModel("exaone4", _base(_HD, sliding_window=None, layer_types=["full_attention"] * 4)),
    "seed_oss": SmallModel("seed_oss", _base()),
    "glm4_moe": SmallModel("glm4_moe", _base(**_GROUPED_EXPERTS, first_k_dense_replace=1)),
    "ernie4_5_moe": SmallModel(
        "ernie4_5_moe",
        _base(_HD, moe_num_experts=4, moe_k=2, moe_intermediate_size=128, moe_num_shared_experts=1, pad_token_id=1),
    ),
    "ministral3": SmallModel("ministral3", _base()),
    "falcon_h1": SmallModel("falcon_h1", _base(mamba_d_ssm=256, **_MAMBA)),
}


def build(name: str, out: Path) -> Path:
    """Save a model in f32, and tiny-llama's tokenizer beside it, in the folder `out`."""
    return build_model(MODELS[name], out)


def build_model(row: SmallModel, out: Path) -> Path:
    """The same, of a row that need not be in the table."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    )

    config = transformers.AutoConfig.for_model(row.model_type, **row.config)
    if row.model_type == "t5":
        model_class: Any = transformers.T5ForConditionalGeneration
    else:
        mapping = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING if row.reads_images else MODEL_FOR_CAUSAL_LM_MAPPING
        known = mapping[type(config)]
        model_class = known[0] if isinstance(known, tuple) else known
    torch.manual_seed(0)
    model = model_class(config).eval()
    _randomize(model)
    model.save_pretrained(out)
    for file in TOKENIZER_FILES:
        shutil.copy(tiny_llama_path() / file, out / file)
    return out


@torch.no_grad()
def _randomize(model: nn.Module) -> None:
    """Weights of a size that keeps activations near 1; norms, biases and stored buffers that are not their defaults."""
    generator = torch.Generator().manual_seed(0)
    attention_is_unscaled = any(type(module).__name__ in _UNSCALED for module in model.modules())

    def normal(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator)

    for name, parameter in model.named_parameters():
        leaf = name.rpartition(".")[2]
        if parameter.ndim >= 2 and "conv" in name.lower():
            parameter.add_(0.2 * normal(parameter) * max(float(parameter.std()), 0.1))
        elif parameter.ndim >= 2 and "A_log" in leaf:
            parameter.mul_(1 + 0.1 * normal(parameter))
        elif parameter.ndim >= 2:
            parameter.copy_(normal(parameter) / parameter.shape[-1] ** 0.5)
        elif "norm" in name.lower() and leaf == "weight":
            parameter.add_(0.2 * normal(parameter))
            if attention_is_unscaled and "q_norm" in name:  # trained ones keep attention as soft as others' scale does
                parameter.mul_(parameter.shape[0] ** -0.5)
        elif leaf == "bias":
            parameter.add_(0.1 * normal(parameter))
        elif parameter.is_floating_point():
            parameter.add_(0.05 * normal(parameter) * (parameter.abs() + 0.1))
    stored = model.state_dict()
    for name, buffer in model.named_buffers():
        if name in stored and buffer.is_floating_point():
            if "correction_bias" in name or "expert_bias" in name:
                buffer.copy_(0.1 * normal(buffer))
            elif "layer_scalar" in name:
                buffer.copy_(0.3 + 0.4 * torch.rand(buffer.shape, generator=generator))
