"""BLOOM."""

from __future__ import annotations

from collections.abc import Iterator

import gguf

from exporters.gguf.families.family import TANH_GELU, Family
from exporters.gguf.families.row_orders import Config, grouped_order


def _derived(config: Config) -> Config:
    """ALiBi has no longest context; `seq_length` says what the published models were trained with."""
    return {
        "intermediate_size": 4 * config["hidden_size"],
        "hidden_act": "gelu_new",  # BloomGelu is the tanh approximation
        "norm_eps": config["layer_norm_epsilon"],
        "num_key_value_heads": config["num_attention_heads"],
        "max_position_embeddings": config.get("seq_length") or 2048,
    }


def _problems(config: Config) -> Iterator[str]:
    if config["apply_residual_connection_post_layernorm"]:
        yield "adds the residual from before the norm, this model from behind it"


ROWS = (
    Family(
        "bloom",
        gguf.MODEL_ARCH.BLOOM,
        grouped_order,
        _derived,
        problems=_problems,
        layer_norm=True,
        rotary=False,
        activations=TANH_GELU,
    ),
)
