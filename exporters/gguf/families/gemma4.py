"""Gemma 4 (text): the dense models, the mixture of experts, and those with per-layer embeddings (E2B, E4B)."""

from __future__ import annotations

from collections.abc import Iterator

import gguf

from exporters.gguf.families.family import TANH_GELU, Family, Stored, add_expert_counts
from exporters.gguf.families.rope import rope_parameters
from exporters.gguf.families.row_orders import Config
from exporters.gguf.families.shared_layers import sharing_problems
from exporters.gguf.tokenizer.tokenizer import GEMMA4

_NO_BIAS = (".q_proj.bias", ".k_proj.bias", ".v_proj.bias", ".o_proj.bias")
_FULL = "full_attention"

# Ending of a parameter's name → its place in a block, where gguf's table has none for it as it is.
_OF_A_BLOCK = {
    ".layer_scalar": "layer_output_scale.weight",
    ".router.scale": "ffn_gate_inp.scale",
    ".router.per_expert_scale": "ffn_down_exps.scale",
    ".experts.gate_proj.weight": "ffn_gate_up_exps.weight",
    ".experts.up_proj.weight": "ffn_gate_up_exps.weight",
}


def _layers(config: Config) -> list[Config]:
    """What of the config each layer has for itself, under the config's names."""
    own = {
        int(layer): entries for layer, entries in (config.get("per_layer_config") or {}).items()
    }  # "04" and the like
    shared = {name: config[name] for name in ("head_dim", "num_key_value_heads")}
    return [{**shared, **own.get(layer, {})} for layer in range(int(config["num_hidden_layers"]))]


def _derived(config: Config) -> Config:
    layers, kinds = _layers(config), config["layer_types"]
    full = [layer["head_dim"] for layer, kind in zip(layers, kinds, strict=True) if kind == _FULL]
    in_windows = [layer["head_dim"] for layer, kind in zip(layers, kinds, strict=True) if kind != _FULL]
    width = int(config["intermediate_size"])
    first_shared = len(kinds) - int(config["num_kv_shared_layers"])
    widths = [2 * width if config["use_double_wide_mlp"] and i >= first_shared else width for i in range(len(kinds))]
    return {
        "hidden_act": config["hidden_activation"],
        "head_dim": full[0],
        "head_dim_in_windows": in_windows[0] if in_windows else full[0],
        "num_head_dims": (len(set(full)), len(set(in_windows))),
        "key_heads_by_layer": [int(layer["num_key_value_heads"]) for layer in layers],
        "feed_forward_by_layer": widths,
        "num_experts_per_tok": config["top_k_experts"],
    }


def _keys(writer: gguf.GGUFWriter, config: Config) -> None:
    if config["final_logit_softcapping"]:
        writer.add_final_logit_softcapping(float(config["final_logit_softcapping"]))
    writer.add_rope_freq_base_swa(float(config["rope_parameters"]["sliding_attention"]["rope_theta"]))
    writer.add_rope_dimension_count_swa(int(config["head_dim_in_windows"]))
    writer.add_key_length_swa(int(config["head_dim_in_windows"]))
    writer.add_value_length_swa(int(config["head_dim_in_windows"]))
    writer.add_sliding_window(int(config["sliding_window"]))
    writer.add_sliding_window_pattern([kind != _FULL for kind in config["layer_types"]])
    writer.add_shared_kv_layers(int(config["num_kv_shared_layers"]))
    writer.add_embedding_length_per_layer_input(int(config["hidden_size_per_layer_input"] or 0))
    if config["enable_moe_block"]:
        add_expert_counts(writer, config)
        writer.add_expert_feed_forward_length(int(config["moe_intermediate_size"]))


def _problems(config: Config) -> Iterator[str]:
    if rope_parameters(config)["rope_type"] != "proportional":
        yield "has proportional rotation in layers with full attention, this model another kind"
    in_windows = config["rope_parameters"]["sliding_attention"]
    if in_windows.get("rope_type", "default") != "default" or in_windows.get("partial_rotary_factor", 1.0) != 1.0:
        yield "has plain rotation in layers with a window, this model another kind"
    if max(config["num_head_dims"]) > 1:
        yield "has one head_dim for layers with a window and one for the others, this model more (per_layer_config)"
    if config["use_bidirectional_attention"] == "all":
        yield "attends to the past only, this model to both sides"
    if config["hidden_size_per_layer_input"] and config["vocab_size_per_layer_input"] != config["vocab_size"]:
        yield "has per-layer embeddings of all tokens, this model of some (vocab_size_per_layer_input)"
    yield from sharing_problems(config)


def _stored(config: Config, name: str, shape: tuple[int, ...]) -> tuple[Stored, ...] | None:
    place = next((place for ending, place in _OF_A_BLOCK.items() if name.endswith(ending)), None)
    return None if place is None else (Stored(f"blk.{name.split('.')[2]}.{place}"),)


ROWS = (
    Family(
        "gemma4_text",
        gguf.MODEL_ARCH.GEMMA4,
        derived=_derived,
        keys=_keys,
        problems=_problems,
        rope_scalings=("proportional",),
        windows=True,
        activations=TANH_GELU,
        without=_NO_BIAS,
        stored=_stored,
        tokenizer=GEMMA4,
    ),
)
