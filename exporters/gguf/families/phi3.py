"""Phi-3 (also 3.5 and 4, of the same `model_type`)."""

from __future__ import annotations

from collections.abc import Iterator

import gguf

from exporters.gguf.families.family import Family, sliding_window
from exporters.gguf.families.rope import rope_parameters
from exporters.gguf.families.row_orders import Config


def _keys(writer: gguf.GGUFWriter, config: Config) -> None:
    if sliding_window(config) is None:
        writer.add_sliding_window(0)  # older llama.cpp assumes a window of its own where the key is missing
    if rope_parameters(config)["rope_type"] == "default":  # a scaling writes it itself
        writer.add_rope_scaling_orig_ctx_len(int(config["original_max_position_embeddings"]))


def _problems(config: Config) -> Iterator[str]:
    if config["head_dim"] * config["num_attention_heads"] != config["hidden_size"]:
        yield "has heads that are together as wide as the model, this model's are not"


ROWS = (
    Family(
        "phi3",
        gguf.MODEL_ARCH.PHI3,
        keys=_keys,
        problems=_problems,
        partial_rotary=True,
        rope_scalings=("longrope",),
    ),
)
