"""Bamba: Mamba-2 in most layers, in the others attention that rotates half of each head."""

from __future__ import annotations

from collections.abc import Iterator

import gguf

from exporters.gguf.families.family import Family
from exporters.gguf.families.mamba2 import RESPELLED, heads_by_layer, mamba_problems, prefixed_sizes
from exporters.gguf.families.rope import rotary_dims
from exporters.gguf.families.row_orders import Config, RowOrder, interleaved_rows


def _order(config: Config, projection: str, rows: int) -> RowOrder | None:
    """As Llama's, of the part of a head that is rotated. (llama.cpp's converter reorders whole heads.)"""
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(projection)
    return None if heads is None else interleaved_rows(rows, int(config[heads]), rotary_dims(config))


def _derived(config: Config) -> Config:
    attention = config["attn_layer_indices"] or []
    kinds = ["full_attention" if i in attention else "" for i in range(int(config["num_hidden_layers"]))]
    return heads_by_layer(kinds, config)


def _keys(writer: gguf.GGUFWriter, config: Config) -> None:
    writer.add_rope_scaling_finetuned(True)  # llama.cpp's switch for the rotation
    prefixed_sizes(config).add_keys(writer)


def _problems(config: Config) -> Iterator[str]:
    yield from mamba_problems(config["mamba_conv_bias"], tuple(config["time_step_limit"]))
    if config["mamba_expand"] != 2:
        yield f"has Mamba layers of twice the hidden size, this model's have {config['mamba_expand']} times"


ROWS = (
    Family(
        "bamba",
        gguf.MODEL_ARCH.GRANITE_HYBRID,
        _order,
        _derived,
        _keys,
        _problems,
        partial_rotary=True,
        without=(".mamba.in_proj.bias", ".mamba.out_proj.bias"),
        stored=lambda config, name, shape: prefixed_sizes(config).stored(name, shape),
        respelled=RESPELLED,
    ),
)
