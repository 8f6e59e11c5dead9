"""EXAONE 4: norms behind attention and feed-forward; the 32B model has windows, and no rotation in the other layers."""

from __future__ import annotations

from collections.abc import Iterator

import gguf

from exporters.gguf.families.family import Family
from exporters.gguf.families.row_orders import Config

_WITH_WINDOWS = 64  # layers of the 32B model, by which `load_arch_hparams` in exaone4.cpp knows it


def _keys(writer: gguf.GGUFWriter, config: Config) -> None:
    if config["sliding_window"] is not None:
        writer.add_sliding_window(int(config["sliding_window"]))
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config["layer_types"]])


def _problems(config: Config) -> Iterator[str]:
    if (config["sliding_window"] is not None) != (config["num_hidden_layers"] == _WITH_WINDOWS):
        yield "has windows in models of 64 layers and in no others, this model's sliding_window says otherwise"
    if config["head_dim"] * config["num_attention_heads"] != config["hidden_size"]:
        yield "has heads that are together as wide as the model, this model's are not"


ROWS = (
    Family(
        "exaone4",
        gguf.MODEL_ARCH.EXAONE4,
        keys=_keys,
        problems=_problems,
        rope_scalings=("llama3",),
        windows=True,
    ),
)
