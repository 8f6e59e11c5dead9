"""Nemotron (Nemotron-4, Minitron): LayerNorm by 1 + weight, squared ReLU and no gate."""

from __future__ import annotations

from collections.abc import Iterator

import gguf

from exporters.gguf.families.family import RELU_SQUARED, Family
from exporters.gguf.families.rope import say_unscaled
from exporters.gguf.families.row_orders import Config


def _problems(config: Config) -> Iterator[str]:
    if config["tie_word_embeddings"]:
        yield "needs an output head of its own, this model ties it to the embedding"
    if config["head_dim"] * config["num_attention_heads"] != config["hidden_size"]:
        yield "has heads that are together as wide as the model, this model's are not"


ROWS = (
    Family(
        "nemotron",
        gguf.MODEL_ARCH.NEMOTRON,
        keys=say_unscaled,
        problems=_problems,
        layer_norm=True,
        partial_rotary=True,
        activations=RELU_SQUARED,
        norm_added=True,
    ),
)
