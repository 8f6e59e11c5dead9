"""GLM-4.5 and later: mixtures of experts, chosen as DeepSeek V3's are."""

from __future__ import annotations

import gguf

from exporters.gguf.families.experts import add_sigmoid_experts, score_bias
from exporters.gguf.families.family import Family, Stored
from exporters.gguf.families.row_orders import Config


def _derived(config: Config) -> Config:
    return {"num_experts": config["n_routed_experts"]}


def _stored(config: Config, name: str, shape: tuple[int, ...]) -> tuple[Stored, ...] | None:
    return score_bias(name)


ROWS = (
    Family(
        "glm4_moe",
        gguf.MODEL_ARCH.GLM4_MOE,
        derived=_derived,
        keys=add_sigmoid_experts,
        partial_rotary=True,
        without=(".o_proj.bias",),
        stored=_stored,
    ),
)
