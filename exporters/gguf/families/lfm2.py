"""LFM2: most layers are short convolutions over time, some have attention. Also its mixtures of experts."""

from __future__ import annotations

from collections.abc import Iterator

import gguf

from exporters.gguf.families.family import Family, add_expert_counts
from exporters.gguf.families.row_orders import Config

_NO_BIAS = (".conv.conv.bias", ".conv.in_proj.bias", ".conv.out_proj.bias")


def _derived(config: Config) -> Config:
    return {
        "key_heads_by_layer": [
            int(config["num_key_value_heads"]) if kind == "full_attention" else 0 for kind in config["layer_types"]
        ]
    }


def _dense_derived(config: Config) -> Config:
    return {"intermediate_size": _feed_forward_length(config), **_derived(config)}


def _feed_forward_length(config: Config) -> int:
    """Source: `Lfm2MLP` in transformers."""
    length = int(config["intermediate_size"])
    if config["block_auto_adjust_ff_dim"]:
        length = int(2 * length / 3)
        if config["block_ffn_dim_multiplier"] is not None:
            multiple = int(config["block_multiple_of"])
            length = -(-int(config["block_ffn_dim_multiplier"] * length) // multiple) * multiple
    return length


def _keys(writer: gguf.GGUFWriter, config: Config) -> None:
    writer.add_shortconv_l_cache(int(config["conv_L_cache"]))


def _moe_keys(writer: gguf.GGUFWriter, config: Config) -> None:
    _keys(writer, config)
    add_expert_counts(writer, config)
    writer.add_expert_feed_forward_length(int(config["moe_intermediate_size"]))
    writer.add_leading_dense_block_count(int(config["num_dense_layers"]))
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)


def _problems(config: Config) -> Iterator[str]:
    if config["conv_L_cache"] < 2:
        yield "has convolutions of at least two tokens, this model's are of one"
    if config["head_dim"] * config["num_attention_heads"] != config["hidden_size"]:
        yield "has heads that are together as wide as the model, this model's are not"


def _moe_problems(config: Config) -> Iterator[str]:
    yield from _problems(config)
    if not config["use_expert_bias"]:
        yield "adds a bias where experts are chosen, this model has none (use_expert_bias)"
    if not config["norm_topk_prob"]:
        yield "lets the weights of the chosen experts add up to 1, this model does not (norm_topk_prob)"
    if config["routed_scaling_factor"] != 1:
        yield f"adds what the chosen experts put out as it is, this model times {config['routed_scaling_factor']}"


ROWS = (
    Family("lfm2", gguf.MODEL_ARCH.LFM2, derived=_dense_derived, keys=_keys, problems=_problems, without=_NO_BIAS),
    Family(
        "lfm2_moe",
        gguf.MODEL_ARCH.LFM2MOE,
        derived=_derived,
        keys=_moe_keys,
        problems=_moe_problems,
        without=_NO_BIAS,
        respelled=((".feed_forward.experts.", ".mlp.experts."), (".expert_bias", ".expert_bias.bias")),
    ),
)
