"""GPT-NeoX (Pythia)."""

from __future__ import annotations

from collections.abc import Iterator

import gguf

from exporters.gguf.families.family import TANH_GELU, Family
from exporters.gguf.families.row_orders import Config, grouped_order


def _derived(config: Config) -> Config:
    return {"norm_eps": config["layer_norm_eps"], "num_key_value_heads": config["num_attention_heads"]}


def _keys(writer: gguf.GGUFWriter, config: Config) -> None:
    writer.add_parallel_residual(bool(config["use_parallel_residual"]))


def _problems(config: Config) -> Iterator[str]:
    if config["tie_word_embeddings"]:
        yield "needs an output head of its own, this model ties it to the embedding"
    if not config["attention_bias"]:
        yield "needs biases of the attention projections, this model has none"


ROWS = (
    Family(
        "gpt_neox",
        gguf.MODEL_ARCH.GPTNEOX,
        grouped_order,
        _derived,
        _keys,
        _problems,
        layer_norm=True,
        partial_rotary=True,
        activations=(*TANH_GELU, "gelu"),
    ),
)
