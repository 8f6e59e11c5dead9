"""Falcon, with either decoder architecture."""

from __future__ import annotations

from collections.abc import Iterator

import gguf

from exporters.gguf.families.family import TANH_GELU, Family
from exporters.gguf.families.row_orders import Config, grouped_order


def _derived(config: Config) -> Config:
    grouped = config["new_decoder_architecture"] or not config["multi_query"]
    return {
        "intermediate_size": config["ffn_hidden_size"],
        "hidden_act": config["activation"],
        "norm_eps": config["layer_norm_epsilon"],
        "num_key_value_heads": config["num_kv_heads"] if grouped else 1,
    }


def _keys(writer: gguf.GGUFWriter, config: Config) -> None:
    writer.add_tensor_data_layout("jploski")  # the converter's name for its order of rows


def _problems(config: Config) -> Iterator[str]:
    if config["alibi"]:
        yield "has rotary positions, this model has ALiBi"
    if not config["parallel_attn"]:
        yield "computes attention and feed-forward side by side, this model one after the other"
    if config["bias"]:
        yield "has no biases, this model has some"


ROWS = (
    Family(
        "falcon",
        gguf.MODEL_ARCH.FALCON,
        grouped_order,
        _derived,
        _keys,
        _problems,
        layer_norm=True,
        activations=(*TANH_GELU, "gelu"),
    ),
)
