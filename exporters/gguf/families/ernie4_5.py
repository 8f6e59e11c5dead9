"""ERNIE 4.5, dense and with mixtures of experts."""

from __future__ import annotations

from collections.abc import Iterator

import gguf

from exporters.gguf.families.experts import score_bias
from exporters.gguf.families.family import NO_OUTPUT_BIAS, Family, Stored, add_expert_counts
from exporters.gguf.families.row_orders import Config


def _moe_derived(config: Config) -> Config:
    return {"num_experts": config["moe_num_experts"], "num_experts_per_tok": config["moe_k"]}


def _moe_keys(writer: gguf.GGUFWriter, config: Config) -> None:
    add_expert_counts(writer, config)
    writer.add_interleave_moe_layer_step(int(config["moe_layer_interval"]))
    writer.add_leading_dense_block_count(int(config["moe_layer_start_index"]))
    width, shared = int(config["moe_intermediate_size"]), int(config["moe_num_shared_experts"])
    writer.add_expert_feed_forward_length(width)
    writer.add_expert_shared_count(shared)
    if shared:
        writer.add_expert_shared_feed_forward_length(width * shared)


def _moe_problems(config: Config) -> Iterator[str]:
    if config["moe_layer_interval"] != 1 or config["moe_layer_end_index"] != config["num_hidden_layers"] - 1:
        yield "has experts in all layers from moe_layer_start_index on, this model not in all"


def _moe_stored(config: Config, name: str, shape: tuple[int, ...]) -> tuple[Stored, ...] | None:
    return score_bias(name)


# Rotates neighbouring pairs in transformers too, so rows keep their order.
ROWS = (
    Family("ernie4_5", gguf.MODEL_ARCH.ERNIE4_5, without=NO_OUTPUT_BIAS),
    Family(
        "ernie4_5_moe",
        gguf.MODEL_ARCH.ERNIE4_5_MOE,
        derived=_moe_derived,
        keys=_moe_keys,
        problems=_moe_problems,
        without=NO_OUTPUT_BIAS,
        stored=_moe_stored,
    ),
)
