"""Ministral 3: YaRN, and queries that grow with their position beyond the original context."""

from __future__ import annotations

from collections.abc import Iterator

import gguf

from exporters.gguf.families.family import Family
from exporters.gguf.families.llama import interleaved_order
from exporters.gguf.families.rope import rope_parameters
from exporters.gguf.families.row_orders import Config


def _keys(writer: gguf.GGUFWriter, config: Config) -> None:
    rope = rope_parameters(config)
    writer.add_attn_temperature_scale(float(rope["llama_4_scaling_beta"]))


def _problems(config: Config) -> Iterator[str]:
    rope = rope_parameters(config)
    if rope["rope_type"] != "yarn":
        yield "takes the scale of queries from YaRN's original context, this model's rotation is not YaRN"
    elif (rope.get("mscale") or 0) != (1 if rope.get("mscale_all_dim") else 0) or rope.get("attention_factor"):
        yield "has YaRN with mscale 1 where there is an mscale_all_dim, this model has another factor on attention"


ROWS = (
    Family(
        "ministral3",
        gguf.MODEL_ARCH.MISTRAL3,
        interleaved_order,
        keys=_keys,
        problems=_problems,
        rope_scalings=("mscale_all_dim", "betas"),
    ),
)
