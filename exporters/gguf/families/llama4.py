"""Llama 4 (text): attention in chunks, every fourth layer without rotation, mixtures of experts in some layers."""

from __future__ import annotations

from collections.abc import Iterator

import gguf

from exporters.gguf.families.family import Family, add_expert_counts
from exporters.gguf.families.row_orders import Config

# What `load_arch_hparams` in llama4.cpp has as numbers.
_CHUNK, _FLOOR_SCALE, _ATTN_SCALE, _WITHOUT_NORMS = 8192, 8192, 0.1, 128


def _derived(config: Config) -> Config:
    return {
        "intermediate_size": config["intermediate_size_mlp"],
        "moe_intermediate_size": config["intermediate_size"],
        "num_experts": config["num_local_experts"],
    }


def _keys(writer: gguf.GGUFWriter, config: Config) -> None:
    writer.add_interleave_moe_layer_step(int(config["interleave_moe_layer_step"]))
    add_expert_counts(writer, config)
    writer.add_expert_feed_forward_length(int(config["moe_intermediate_size"]))


def _problems(config: Config) -> Iterator[str]:
    layers, context = int(config["num_hidden_layers"]), int(config["max_position_embeddings"])
    rotated = [int((layer + 1) % 4 != 0) for layer in range(layers)]
    if config["no_rope_layers"] != rotated:
        yield "leaves the rotation out of every fourth layer, this model has other no_rope_layers"
    if config["layer_types"] != ["chunked_attention" if here else "full_attention" for here in rotated]:
        yield "has full attention in every fourth layer and chunks in the others, this model has other layer_types"
    chunk = int(config["attention_chunk_size"] or context)
    if chunk != _CHUNK and min(chunk, _CHUNK) < context:
        yield f"has chunks of {_CHUNK} tokens, this model of {chunk}"
    tunes = config["attn_temperature_tuning"]
    scales = (config["floor_scale"], config["attn_scale"]) if tunes else (context + 1, 0.0)
    if scales != (_FLOOR_SCALE, _ATTN_SCALE) and min(scales[0], _FLOOR_SCALE) <= context:
        yield f"scales queries by floor_scale {_FLOOR_SCALE} and attn_scale {_ATTN_SCALE}, this model otherwise"
    step = int(config["interleave_moe_layer_step"])
    if config["moe_layers"] != list(range(step - 1, layers, step)):
        yield "has experts in every interleave_moe_layer_step-th layer, this model has other moe_layers"
    if config["use_qk_norm"] != (config["num_local_experts"] != _WITHOUT_NORMS):
        yield "normalizes queries and keys unless there are 128 experts, this model's use_qk_norm says otherwise"


# Rotates neighbouring pairs in transformers too, so rows keep their order.
ROWS = (
    Family(
        "llama4_text",
        gguf.MODEL_ARCH.LLAMA4,
        derived=_derived,
        keys=_keys,
        problems=_problems,
        rope_scalings=("llama3",),
        windows=True,
        without=(".o_proj.bias",),
    ),
)
