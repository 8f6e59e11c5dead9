"""gpt-oss: a mixture of experts with biases, attention sinks, and windows in every other layer."""

from __future__ import annotations

from collections.abc import Iterator

import gguf

from exporters.gguf.families.family import Family, Stored, add_expert_counts
from exporters.gguf.families.row_orders import Config
from exporters.gguf.families.windows import window_period

_SINKS = ".self_attn.sinks"


def _derived(config: Config) -> Config:
    return {"num_experts": config["num_local_experts"]}


def _keys(writer: gguf.GGUFWriter, config: Config) -> None:
    writer.add_sliding_window(int(config["sliding_window"]))
    if window_period(config) != 2:  # what llama.cpp takes where the key is missing
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config["layer_types"]])
    add_expert_counts(writer, config)
    writer.add_expert_feed_forward_length(int(config["intermediate_size"]))


def _problems(config: Config) -> Iterator[str]:
    if config["tie_word_embeddings"]:
        yield "needs an output head of its own, this model ties it to the embedding"
    if not config["attention_bias"]:
        yield "needs biases of the attention projections, this model has none"
    if (config["swiglu_alpha"], config["swiglu_limit"]) != (1.702, 7.0):
        yield "computes its gates with swiglu_alpha 1.702 and swiglu_limit 7, this model with others"


def _stored(config: Config, name: str, shape: tuple[int, ...]) -> tuple[Stored, ...] | None:
    if not name.endswith(_SINKS):
        return None
    return (Stored(f"blk.{name.split('.')[2]}.attn_sinks.weight"),)


ROWS = (
    Family(
        "gpt_oss",
        gguf.MODEL_ARCH.GPT_OSS,
        derived=_derived,
        keys=_keys,
        problems=_problems,
        windows=True,
        stored=_stored,
    ),
)
