"""GPT-2."""

from __future__ import annotations

from collections.abc import Iterator

import gguf

from exporters.gguf.families.family import TANH_GELU, Family
from exporters.gguf.families.row_orders import Config


def _derived(config: Config) -> Config:
    return {
        "intermediate_size": config.get("n_inner") or 4 * config["hidden_size"],
        "hidden_act": config["activation_function"],
        "norm_eps": config["layer_norm_epsilon"],
    }


def _problems(config: Config) -> Iterator[str]:
    if not config["scale_attn_weights"] or config["scale_attn_by_inverse_layer_idx"]:
        yield "scales attention by the head size, this model's scale_attn settings say otherwise"


ROWS = (
    Family(
        "gpt2",
        gguf.MODEL_ARCH.GPT2,
        derived=_derived,
        problems=_problems,
        layer_norm=True,
        rotary=False,
        activations=TANH_GELU,
    ),
)
