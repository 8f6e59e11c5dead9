"""Gemma 2 and 3 (text)."""

from __future__ import annotations

from collections.abc import Iterator

import gguf

from exporters.gguf.families.family import TANH_GELU, Family
from exporters.gguf.families.rope import rope_parameters
from exporters.gguf.families.row_orders import Config
from exporters.gguf.families.windows import add_windows, window_period

_NO_BIAS = (".q_proj.bias", ".k_proj.bias", ".v_proj.bias", ".o_proj.bias")


def _derived(config: Config) -> Config:
    return {"hidden_act": config["hidden_activation"]}


def _gemma2_keys(writer: gguf.GGUFWriter, config: Config) -> None:
    writer.add_attn_logit_softcapping(float(config["attn_logit_softcapping"]))
    writer.add_final_logit_softcapping(float(config["final_logit_softcapping"]))
    add_windows(writer, config)


def _gemma3_keys(writer: gguf.GGUFWriter, config: Config) -> None:
    if config["final_logit_softcapping"]:
        writer.add_final_logit_softcapping(float(config["final_logit_softcapping"]))
    writer.add_rope_freq_base_swa(float(config["rope_parameters"]["sliding_attention"]["rope_theta"]))
    add_windows(writer, config)


def _gemma2_problems(config: Config) -> Iterator[str]:
    if not config["attn_logit_softcapping"] or not config["final_logit_softcapping"]:
        yield "always has soft caps, this model lacks one"
    if window_period(config) == 1:
        yield "has windows in some layers, this model in none"
    yield from _problems(config, layers_of_27b=46)


def _gemma3_problems(config: Config) -> Iterator[str]:
    if config["attn_logit_softcapping"]:
        yield "has no soft cap on attention, this model has one"
    if rope_parameters(config)["rope_type"] not in ("default", "linear"):
        yield "scales the rotation linearly or not at all, this model has another scaling"
    if config["rope_parameters"]["sliding_attention"].get("rope_type", "default") != "default":
        yield "has unscaled rotation in layers with a window, this model scales it"
    yield from _problems(config, layers_of_27b=62)


def _problems(config: Config, layers_of_27b: int) -> Iterator[str]:
    """llama.cpp tells the 27B model, whose attention is scaled otherwise, by its number of layers."""
    is_27b = config["num_hidden_layers"] == layers_of_27b
    scale = config["hidden_size"] // config["num_attention_heads"] if is_27b else config["head_dim"]
    if config["query_pre_attn_scalar"] != scale:
        yield f"scales attention by {scale} to the power -1/2, this model by {config['query_pre_attn_scalar']}"
    if config["use_bidirectional_attention"]:
        yield "attends to the past only, this model to both sides"
    if window_period(config) is None:
        yield "has full attention in every p-th layer, this model has other layer_types"


ROWS = (
    Family(
        "gemma2",
        gguf.MODEL_ARCH.GEMMA2,
        derived=_derived,
        keys=_gemma2_keys,
        problems=_gemma2_problems,
        windows=True,
        activations=TANH_GELU,
        norm_added=True,
        without=_NO_BIAS,
    ),
    Family(
        "gemma3_text",
        gguf.MODEL_ARCH.GEMMA3,
        derived=_derived,
        keys=_gemma3_keys,
        problems=_gemma3_problems,
        windows=True,
        activations=TANH_GELU,
        norm_added=True,
        without=_NO_BIAS,
    ),
)
