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

from benchmarks.models.small_settings import (
    DEEPSEEK,
    DELTA_NET,
    EVERY_SECOND_CONV,
    EVERY_SECOND_FULL,
    EVERY_SECOND_LINEAR,
    EXPERTS,
    GEMMA3,
    GEMMA3N,
    GEMMA4,
    GEMMA4_OWN_KEYS,
    GEMMA4_PLAIN,
    GRANITE,
    GROUPED_EXPERTS,
    HD,
    LONGROPE,
    MAMBA,
    MIXTRAL,
    MLA_HEADS,
    MROPE,
    NEMOTRON_H,
    QWEN_TOKENS,
    QWEN_VISION,
    SHARED_EXPERT,
    SIGLIP,
    UNSCALED,
    Config,
    default_rope,
    small,
)
from signround_edge.demo import tiny_llama_path

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class SmallModel:
    """One row: what `AutoConfig.for_model` is given, and whether the model reads images, too."""

    model_type: str
    config: Config
    reads_images: bool = False


MODELS: dict[str, SmallModel] = {
    "llama": SmallModel("llama", small()),
    "mistral": SmallModel("mistral", small(sliding_window=None)),
    "mistral_window": SmallModel("mistral", small(sliding_window=16)),
    "ministral": SmallModel("ministral", small(sliding_window=16, layer_types=EVERY_SECOND_FULL)),
    "mistral3_mm": SmallModel(
        "mistral3",
        {
            "text_config": {**small(pad_token_id=1), "model_type": "mistral"},
            "vision_config": {**SIGLIP, "model_type": "pixtral", "head_dim": 32},
            "image_token_index": 3000,
            "tie_word_embeddings": False,
        },
        True,
    ),
    "mixtral": SmallModel("mixtral", small(HD, **MIXTRAL, sliding_window=None)),
    "qwen2": SmallModel("qwen2", small(HD, tie_word_embeddings=True)),
    "qwen2_moe": SmallModel("qwen2_moe", small(HD, **SHARED_EXPERT)),
    "qwen3": SmallModel("qwen3", small(tie_word_embeddings=True)),
    "qwen3_moe": SmallModel("qwen3_moe", small(**EXPERTS, decoder_sparse_step=1)),
    "qwen3_moe_norm": SmallModel("qwen3_moe", small(**EXPERTS, decoder_sparse_step=1, norm_topk_prob=True)),
    "qwen3_next": SmallModel("qwen3_next", small(**{**DELTA_NET, **SHARED_EXPERT})),
    "qwen3_5_text": SmallModel("qwen3_5_text", small(**DELTA_NET, tie_word_embeddings=True)),
    "qwen3_5_more_value_heads": SmallModel(
        "qwen3_5_text", small(**{**DELTA_NET, "linear_num_value_heads": 8}, tie_word_embeddings=True)
    ),
    "qwen3_5_moe_text": SmallModel("qwen3_5_moe_text", small(**{**DELTA_NET, **SHARED_EXPERT})),
    "qwen3_5_mm": SmallModel(
        "qwen3_5", {"text_config": small(**DELTA_NET), "vision_config": QWEN_VISION, **QWEN_TOKENS}, True
    ),
    "qwen2_vl": SmallModel(
        "qwen2_vl",
        {
            "text_config": small(HD, rope_parameters=MROPE, rms_norm_eps=1e-6),
            "vision_config": {"depth": 2, "embed_dim": 64, "hidden_size": 128, "num_heads": 2, "patch_size": 14},
            **QWEN_TOKENS,
        },
        True,
    ),
    "qwen2_5_vl": SmallModel(
        "qwen2_5_vl",
        {
            "text_config": small(HD, rope_parameters=MROPE, rms_norm_eps=1e-6),
            "vision_config": {
                "depth": 2,
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_heads": 2,
                "out_hidden_size": 128,
                "fullatt_block_indexes": [1],
            },
            **QWEN_TOKENS,
        },
        True,
    ),
    "qwen3_vl": SmallModel(
        "qwen3_vl",
        {
            "text_config": small(rope_parameters=default_rope(mrope_section=[6, 5, 5], mrope_interleaved=True)),
            "vision_config": {**QWEN_VISION, "deepstack_visual_indexes": [0]},
            **QWEN_TOKENS,
        },
        True,
    ),
    "gemma2": SmallModel("gemma2", small(query_pre_attn_scalar=32, sliding_window=16, layer_types=EVERY_SECOND_FULL)),
    "gemma3_text": SmallModel("gemma3_text", GEMMA3),
    "gemma3_mm": SmallModel(
        "gemma3",
        {
            "text_config": GEMMA3,
            "vision_config": SIGLIP,
            "mm_tokens_per_image": 4,
            "boi_token_index": 3000,
            "eoi_token_index": 3001,
            "image_token_index": 3002,
        },
        True,
    ),
    "gemma3n_text": SmallModel("gemma3n_text", GEMMA3N),
    "gemma3n_text_nosharing": SmallModel(
        "gemma3n_text",
        {
            **GEMMA3N,
            "num_hidden_layers": 20,
            "num_kv_shared_layers": 0,
            "layer_types": GEMMA3N["layer_types"][:20],
            "activation_sparsity_pattern": GEMMA3N["activation_sparsity_pattern"][:20],
            "intermediate_size": [2048] * 20,
        },
    ),
    "gemma4_text_plain": SmallModel("gemma4_text", GEMMA4_PLAIN),
    "gemma4_text_k_eq_v": SmallModel("gemma4_text", {**GEMMA4_PLAIN, "attention_k_eq_v": True}),
    "gemma4_text_ple_only": SmallModel("gemma4_text", GEMMA4_OWN_KEYS),
    "gemma4_text_E2B": SmallModel("gemma4_text", GEMMA4),
    "gemma4_text_E2B_no_ple": SmallModel("gemma4_text", {**GEMMA4, "hidden_size_per_layer_input": 0}),
    "gemma4_text_moe": SmallModel(
        "gemma4_text",
        {**GEMMA4_PLAIN, "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 128},
    ),
    "gemma4_mm": SmallModel(
        "gemma4",
        {
            "text_config": GEMMA4,
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
    "phi": SmallModel("phi", small(HD, num_key_value_heads=4, intermediate_size=512)),
    "phi3": SmallModel("phi3", small(HD, original_max_position_embeddings=512, pad_token_id=1)),
    "phi4_mini": SmallModel(
        "phi3",
        small(
            HD,
            original_max_position_embeddings=256,
            pad_token_id=1,
            tie_word_embeddings=True,
            rope_parameters=LONGROPE,
        ),
    ),
    "phimoe": SmallModel("phimoe", small(HD, **MIXTRAL)),
    "lfm2": SmallModel(
        "lfm2",
        small(HD, layer_types=EVERY_SECOND_CONV, block_auto_adjust_ff_dim=False, conv_L_cache=3, pad_token_id=1),
    ),
    "lfm2_moe": SmallModel(
        "lfm2_moe",
        small(
            HD,
            layer_types=EVERY_SECOND_CONV,
            num_dense_layers=1,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=128,
            pad_token_id=1,
        ),
    ),
    "lfm3": SmallModel(
        "lfm3",
        small(layer_types=["conv", "full_attention", "conv", "sliding_attention"], sliding_window=16, pad_token_id=1),
    ),
    "smollm3": SmallModel("smollm3", small(no_rope_layers=[1, 1, 1, 0], pad_token_id=1)),
    "smolvlm": SmallModel(
        "smolvlm",
        {
            "text_config": {**small(), "model_type": "llama"},
            "vision_config": SIGLIP,
            "image_token_id": 3000,
            "pad_token_id": 1,
        },
        True,
    ),
    "gpt_oss": SmallModel(
        "gpt_oss", small(**MIXTRAL, sliding_window=16, layer_types=EVERY_SECOND_FULL, intermediate_size=128)
    ),
    "llama4_text": SmallModel(
        "llama4_text",
        small(
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
    "deepseek_v2": SmallModel("deepseek_v2", small(HD, **DEEPSEEK)),
    "deepseek_v2_lite": SmallModel("deepseek_v2", small(HD, **{**DEEPSEEK, "q_lora_rank": None})),
    "deepseek_v3": SmallModel("deepseek_v3", small(HD, **DEEPSEEK, num_nextn_predict_layers=0)),
    "glm4": SmallModel("glm4", small(rope_parameters=default_rope(partial_rotary_factor=0.5))),
    "glm4_moe_lite": SmallModel(
        "glm4_moe_lite",
        small(HD, **MLA_HEADS, **GROUPED_EXPERTS, mlp_layer_types=["dense", "sparse", "sparse", "sparse"]),
    ),
    "granite": SmallModel("granite", small(HD, **GRANITE)),
    "granitemoe": SmallModel("granitemoe", small(HD, **MIXTRAL, **GRANITE, intermediate_size=128)),
    "granitemoehybrid_moe": SmallModel(
        "granitemoehybrid",
        small(
            HD,
            **MIXTRAL,
            **MAMBA,
            intermediate_size=128,
            shared_intermediate_size=128,
            layer_types=EVERY_SECOND_LINEAR,
            position_embedding_type="nope",
        ),
    ),
    "granitemoehybrid_dense": SmallModel(
        "granitemoehybrid",
        small(
            HD,
            **MAMBA,
            num_local_experts=0,
            num_experts_per_tok=0,
            shared_intermediate_size=256,
            layer_types=EVERY_SECOND_LINEAR,
            position_embedding_type="rope",
        ),
    ),
    "bamba": SmallModel("bamba", small(HD, attn_layer_indices=[1, 3], pad_token_id=1, **MAMBA)),
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
    "nemotron": SmallModel("nemotron", small()),
    "nemotron_h": SmallModel(
        "nemotron_h",
        small(
            "num_hidden_layers", **NEMOTRON_H, layers_block_type=["linear_attention", "mlp", "full_attention", "mlp"]
        ),
    ),
    "nemotron_h_moe": SmallModel(
        "nemotron_h",
        small(
            "num_hidden_layers",
            **NEMOTRON_H,
            layers_block_type=["linear_attention", "moe", "full_attention", "moe"],
            n_routed_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=128,
            moe_shared_expert_intermediate_size=128,
        ),
    ),
    "olmo2": SmallModel("olmo2", small(HD)),
    "olmo3": SmallModel("olmo3", small(HD, sliding_window=16, layer_types=EVERY_SECOND_FULL)),
    "ernie4_5": SmallModel("ernie4_5", small()),
    "hunyuan_v1_dense": SmallModel("hunyuan_v1_dense", small()),
    "minicpm3": SmallModel("minicpm3", small(HD, **MLA_HEADS)),
    "cohere": SmallModel("cohere", small(HD)),
    "arcee": SmallModel("arcee", small()),
    "internlm3": SmallModel("internlm3", small(pad_token_id=1)),
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
    "gemma": SmallModel("gemma", small(tie_word_embeddings=True)),
    "exaone4": SmallModel("exaone4", small(HD, sliding_window=None, layer_types=["full_attention"] * 4)),
    "seed_oss": SmallModel("seed_oss", small()),
    "glm4_moe": SmallModel("glm4_moe", small(**GROUPED_EXPERTS, first_k_dense_replace=1)),
    "ernie4_5_moe": SmallModel(
        "ernie4_5_moe",
        small(HD, moe_num_experts=4, moe_k=2, moe_intermediate_size=128, moe_num_shared_experts=1, pad_token_id=1),
    ),
    "ministral3": SmallModel("ministral3", small()),
    "falcon_h1": SmallModel("falcon_h1", small(mamba_d_ssm=256, **MAMBA)),
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
    attention_is_unscaled = any(type(module).__name__ in UNSCALED for module in model.modules())

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
