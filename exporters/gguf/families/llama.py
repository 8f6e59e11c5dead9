"""Llama, and what is built as Llama is: Mistral, Mixtral, SmolLM3."""

from __future__ import annotations

from collections.abc import Iterator

import gguf

from exporters.gguf.families.family import NO_OUTPUT_BIAS, Family, add_expert_counts
from exporters.gguf.families.row_orders import Config, RowOrder, interleaved_rows


def interleaved_order(config: Config, projection: str, rows: int) -> RowOrder | None:
    """These graphs rotate neighbouring pairs (Meta's original layout): q and k are stored in that order."""
    if projection == "q_proj":
        return interleaved_rows(rows, int(config["num_attention_heads"]))
    if projection == "k_proj":
        return interleaved_rows(rows, int(config["num_key_value_heads"]))
    return None


def _smollm3_problems(config: Config) -> Iterator[str]:
    layers = config["num_hidden_layers"]
    if config["no_rope_layers"] != [int((i + 1) % 4 != 0) for i in range(layers)]:
        yield "leaves the rotation out of every fourth layer, this model has other no_rope_layers"


ROWS = (
    Family("llama", gguf.MODEL_ARCH.LLAMA, interleaved_order, rope_scalings=("llama3",)),
    Family("mistral", gguf.MODEL_ARCH.LLAMA, interleaved_order, rope_scalings=("llama3",)),
    Family("mixtral", gguf.MODEL_ARCH.LLAMA, interleaved_order, keys=add_expert_counts, rope_scalings=("llama3",)),
    Family("smollm3", gguf.MODEL_ARCH.SMOLLM3, interleaved_order, problems=_smollm3_problems, without=NO_OUTPUT_BIAS),
)
