"""Qwen 2 (also 2.5), Qwen 3 and the mixtures of experts of both."""

from __future__ import annotations

from collections.abc import Iterator

import gguf

from exporters.gguf.families.family import NO_OUTPUT_BIAS, Family, add_expert_counts, add_shared_expert
from exporters.gguf.families.row_orders import Config


def _moe_keys(writer: gguf.GGUFWriter, config: Config) -> None:
    add_expert_counts(writer, config)
    writer.add_expert_feed_forward_length(int(config["moe_intermediate_size"]))


def _moe_problems(config: Config) -> Iterator[str]:
    if not config["norm_topk_prob"]:
        yield "lets the weights of the chosen experts add up to 1, this model does not (norm_topk_prob)"


def _qwen2_moe_problems(config: Config) -> Iterator[str]:
    if config["norm_topk_prob"]:
        yield "takes the weights of the chosen experts as they are, this model lets them add up to 1 (norm_topk_prob)"
    if config["tie_word_embeddings"]:
        yield "needs an output head of its own, this model ties it to the embedding"


ROWS = (
    Family("qwen2", gguf.MODEL_ARCH.QWEN2, without=NO_OUTPUT_BIAS),
    Family(
        "qwen2_moe",
        gguf.MODEL_ARCH.QWEN2MOE,
        keys=add_shared_expert,
        problems=_qwen2_moe_problems,
        without=NO_OUTPUT_BIAS,
    ),
    Family("qwen3", gguf.MODEL_ARCH.QWEN3, without=NO_OUTPUT_BIAS),
    Family("qwen3_moe", gguf.MODEL_ARCH.QWEN3MOE, keys=_moe_keys, problems=_moe_problems, without=NO_OUTPUT_BIAS),
)
