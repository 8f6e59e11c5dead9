"""OLMo 2 and 3: norms behind attention and feed-forward, not before them."""

from __future__ import annotations

from collections.abc import Iterator

import gguf

from exporters.gguf.families.family import Family
from exporters.gguf.families.rope import rope_parameters
from exporters.gguf.families.row_orders import Config
from exporters.gguf.families.windows import window_period

_NO_BIAS = (".q_proj.bias", ".k_proj.bias", ".v_proj.bias", ".o_proj.bias")


def _olmo3_keys(writer: gguf.GGUFWriter, config: Config) -> None:
    in_windows = [kind == "sliding_attention" for kind in config["layer_types"]]
    if not any(in_windows):  # llama.cpp aborts where it is told of windows and no layer has one
        return
    writer.add_sliding_window(int(config["sliding_window"]))
    writer.add_sliding_window_pattern(in_windows)
    writer.add_rope_freq_base_swa(float(config["rope_parameters"]["sliding_attention"]["rope_theta"]))


def _problems(config: Config) -> Iterator[str]:
    if config["tie_word_embeddings"]:
        yield "needs an output head of its own, this model ties it to the embedding"
    if config["head_dim"] * config["num_attention_heads"] != config["hidden_size"]:
        yield "has heads that are together as wide as the model, this model's are not"


def _olmo3_problems(config: Config) -> Iterator[str]:
    yield from _problems(config)
    if window_period(config) is None:
        yield "has full attention in every p-th layer, this model has other layer_types"
    in_windows = config["rope_parameters"]["sliding_attention"]
    if in_windows.get("rope_type", "default") != "default":
        yield "has unscaled rotation in layers with a window, this model scales it"
    if in_windows["rope_theta"] != rope_parameters(config)["rope_theta"]:
        yield "has one rope_theta for all layers, this model another one in layers with a window"


ROWS = (
    Family("olmo2", gguf.MODEL_ARCH.OLMO2, problems=_problems, without=_NO_BIAS),
    Family(
        "olmo3",
        gguf.MODEL_ARCH.OLMO2,
        keys=_olmo3_keys,
        problems=_olmo3_problems,
        windows=True,
        without=_NO_BIAS,
    ),
)
