"""Qwen 2 (also 2.5), Qwen 3 and its mixtures of experts."""

from __future__ import annotations

from collections.abc import Iterator

import gguf

from exporters.gguf.families.family import NO_OUTPUT_BIAS, Family, add_expert_counts
from exporters.gguf.families.row_orders import Config


def _moe_keys(writer: gguf.GGUFWriter, config: Config) -> None:
    add_expert_counts(writer, config)
    writer.add_expert_feed_forward_length(int(config["moe_intermediate_size"]))


def _moe_problems(config: Config) -> Iterator[str]:
    if not config["norm_topk_prob"]:
        yield "lets the weights of the chosen experts add up to 1, this model does not (norm_topk_prob)"


ROWS = (
    Family("qwen2", gguf.MODEL_ARCH.QWEN2, without=NO_OUTPUT_BIAS),
    Family("qwen3", gguf.MODEL_ARCH.QWEN3, without=NO_OUTPUT_BIAS),
    Family("qwen3_moe", gguf.MODEL_ARCH.QWEN3MOE, keys=_moe_keys, problems=_moe_problems, without=NO_OUTPUT_BIAS),
)
