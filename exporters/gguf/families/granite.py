"""Granite: Llama with factors on embedding, attention, residuals and logits; its mixtures of experts.

Also Granite 4, whose layers are Mamba-2 or attention; those without Mamba-2 are the former to llama.cpp.
"""

from __future__ import annotations

from collections.abc import Iterator

import gguf
import numpy as np

from exporters.gguf.families.family import Family, Stored, add_expert_counts
from exporters.gguf.families.llama import interleaved_order
from exporters.gguf.families.mamba2 import ANY_LENGTH, RESPELLED, heads_by_layer, mamba_problems, prefixed_sizes
from exporters.gguf.families.row_orders import Config

_EXPERTS = ((".block_sparse_moe.experts.", ".mlp.experts."), (".block_sparse_moe.router.", ".block_sparse_moe.gate."))
_NO_BIAS = (".mamba.in_proj.bias", ".mamba.out_proj.bias")


def _keys(writer: gguf.GGUFWriter, config: Config) -> None:
    writer.add_embedding_scale(float(config["embedding_multiplier"]))
    writer.add_attention_scale(float(config["attention_multiplier"]))
    writer.add_residual_scale(float(config["residual_multiplier"]))
    writer.add_logit_scale(float(config["logits_scaling"]))


def _moe_keys(writer: gguf.GGUFWriter, config: Config) -> None:
    _keys(writer, config)
    add_expert_counts(writer, config)
    if config.get("shared_intermediate_size"):
        writer.add_expert_shared_feed_forward_length(int(config["shared_intermediate_size"]))


def _attention_keys(writer: gguf.GGUFWriter, config: Config) -> None:
    """Of Granite 4, whose config says whether there is a rotation."""
    if config["num_local_experts"]:
        _moe_keys(writer, config)
    else:
        _keys(writer, config)
    writer.add_rope_scaling_finetuned(_is_rotated(config))  # llama.cpp's switch for it


def _hybrid_keys(writer: gguf.GGUFWriter, config: Config) -> None:
    _attention_keys(writer, config)
    prefixed_sizes(config).add_keys(writer)


def _is_rotated(config: Config) -> bool:
    return bool(config["position_embedding_type"] == "rope")


def _attention_derived(config: Config) -> Config:
    found: Config = {}
    if not config["num_local_experts"]:
        found["intermediate_size"] = config["shared_intermediate_size"]
    if not _is_rotated(config):
        found["max_position_embeddings"] = ANY_LENGTH
    return found


def _hybrid_derived(config: Config) -> Config:
    return {**_attention_derived(config), **heads_by_layer(config["layer_types"], config)}


def _hybrid_problems(config: Config) -> Iterator[str]:
    yield from mamba_problems(config["mamba_conv_bias"], tuple(config["time_step_limit"]))
    if config["mamba_expand"] != 2:
        yield f"has Mamba layers of twice the hidden size, this model's have {config['mamba_expand']} times"


def _moe_problems(config: Config) -> Iterator[str]:
    if not _is_rotated(config):
        yield "has rotary positions, this model has none"


def _shared_stored(config: Config, name: str, shape: tuple[int, ...]) -> tuple[Stored, ...] | None:
    """Gates and the rest of the shared expert are one matrix; where no other experts are, it is the feed-forward."""
    if ".shared_mlp." not in name:
        return None
    suffix = "_shexp" if config["num_local_experts"] else ""
    block = name.split(".")[2]
    if name.endswith("output_linear.weight"):
        return (Stored(f"blk.{block}.ffn_down{suffix}.weight"),)
    gates, others = np.split(np.arange(shape[0], dtype=np.intp), 2)
    return Stored(f"blk.{block}.ffn_gate{suffix}.weight", gates), Stored(f"blk.{block}.ffn_up{suffix}.weight", others)


def _hybrid_stored(config: Config, name: str, shape: tuple[int, ...]) -> tuple[Stored, ...] | None:
    return _shared_stored(config, name, shape) or prefixed_sizes(config).stored(name, shape)


def _only_attention(config: Config) -> Family | None:
    if "linear_attention" in config["layer_types"]:
        return None
    return _ONLY_ATTENTION_MOE if config["num_local_experts"] else _ONLY_ATTENTION


_ONLY_ATTENTION = Family(
    "granitemoehybrid",
    gguf.MODEL_ARCH.GRANITE,
    interleaved_order,
    _attention_derived,
    _attention_keys,
    rope_scalings=("llama3",),
    stored=_shared_stored,
)
_ONLY_ATTENTION_MOE = Family(
    "granitemoehybrid",
    gguf.MODEL_ARCH.GRANITE_MOE,
    interleaved_order,
    _attention_derived,
    _attention_keys,
    _moe_problems,
    rope_scalings=("llama3",),
    stored=_shared_stored,
    respelled=_EXPERTS,
)

ROWS = (
    Family("granite", gguf.MODEL_ARCH.GRANITE, interleaved_order, keys=_keys, rope_scalings=("llama3",)),
    Family(
        "granitemoe",
        gguf.MODEL_ARCH.GRANITE_MOE,
        interleaved_order,
        keys=_moe_keys,
        rope_scalings=("llama3",),
        respelled=_EXPERTS,
    ),
    Family(
        "granitemoeshared",
        gguf.MODEL_ARCH.GRANITE_MOE,
        interleaved_order,
        keys=_moe_keys,
        rope_scalings=("llama3",),
        stored=_shared_stored,
        respelled=_EXPERTS,
    ),
    Family(
        "granitemoehybrid",
        gguf.MODEL_ARCH.GRANITE_HYBRID,
        interleaved_order,
        _hybrid_derived,
        _hybrid_keys,
        _hybrid_problems,
        rope_scalings=("llama3",),
        without=_NO_BIAS,
        stored=_hybrid_stored,
        respelled=(*_EXPERTS, *RESPELLED),
        elsewhere=_only_attention,
    ),
)
