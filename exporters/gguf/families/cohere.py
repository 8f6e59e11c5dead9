"""Cohere (Command R)."""

from __future__ import annotations

from collections.abc import Iterator

import gguf

from exporters.gguf.families.family import NO_OUTPUT_BIAS, Family
from exporters.gguf.families.rope import say_unscaled
from exporters.gguf.families.row_orders import Config

_LAYERS_WITH_NORMS = 64  # llama.cpp tells Command R+, whose queries and keys have norms, by its number of layers


def _derived(config: Config) -> Config:
    """`model_max_length` is how published configs say that the model was trained on longer texts."""
    context = config.get("model_max_length") or config["max_position_embeddings"]
    return {"norm_eps": config["layer_norm_eps"], "max_position_embeddings": context}


def _keys(writer: gguf.GGUFWriter, config: Config) -> None:
    writer.add_logit_scale(float(config["logit_scale"]))
    say_unscaled(writer, config)


def _problems(config: Config) -> Iterator[str]:
    if config["use_qk_norm"] != (config["num_hidden_layers"] >= _LAYERS_WITH_NORMS):
        yield "has norms of queries and keys from 64 layers on and none below, this model's use_qk_norm says otherwise"


# Rotates neighbouring pairs in transformers too, so rows keep their order.
ROWS = (
    Family(
        "cohere",
        gguf.MODEL_ARCH.COMMAND_R,
        derived=_derived,
        keys=_keys,
        problems=_problems,
        layer_norm=True,
        without=NO_OUTPUT_BIAS,
    ),
)
