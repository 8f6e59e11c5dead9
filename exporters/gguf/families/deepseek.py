"""DeepSeek V2 and V3, and GLM-4.7-Flash, which llama.cpp has as DeepSeek: latent attention, mixtures of experts."""

from __future__ import annotations

from collections.abc import Iterator

import gguf

from exporters.gguf.families.experts import add_experts, add_sigmoid_experts
from exporters.gguf.families.family import Family
from exporters.gguf.families.mla import NO_BIASES, add_mla, mla_derived, mla_problems, mla_stored
from exporters.gguf.families.row_orders import Config


def _glm_derived(config: Config) -> Config:
    kinds = config["mlp_layer_types"]
    return {**mla_derived(config), "first_k_dense_replace": [*kinds, "sparse"].index("sparse")}


def _v2_keys(writer: gguf.GGUFWriter, config: Config) -> None:
    add_mla(writer, config)
    add_experts(writer, config)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SOFTMAX)


def _v3_keys(writer: gguf.GGUFWriter, config: Config) -> None:
    add_mla(writer, config)
    add_sigmoid_experts(writer, config)


def _v2_problems(config: Config) -> Iterator[str]:
    yield from mla_problems(config)
    if config["topk_method"] != "greedy" and int(config["n_group"] or 1) > 1:
        yield "chooses groups of experts by their two best, this model by the best one (topk_method)"


def _glm_problems(config: Config) -> Iterator[str]:
    yield from mla_problems(config)
    kinds, dense = config["mlp_layer_types"], int(config["first_k_dense_replace"])
    if kinds != ["dense"] * dense + ["sparse"] * (len(kinds) - dense):
        yield "has experts in all layers behind the first without, this model has other mlp_layer_types"


ROWS = (
    Family(
        "deepseek_v2",
        gguf.MODEL_ARCH.DEEPSEEK2,
        derived=mla_derived,
        keys=_v2_keys,
        problems=_v2_problems,
        rope_scalings=("mscale",),
        without=NO_BIASES,
        stored=mla_stored,
    ),
    Family(
        "deepseek_v3",
        gguf.MODEL_ARCH.DEEPSEEK2,
        derived=mla_derived,
        keys=_v3_keys,
        problems=mla_problems,
        rope_scalings=("mscale",),
        without=NO_BIASES,
        stored=mla_stored,
    ),
    Family(
        "glm4_moe_lite",
        gguf.MODEL_ARCH.DEEPSEEK2,
        derived=_glm_derived,
        keys=_v3_keys,
        problems=_glm_problems,
        rope_scalings=("mscale",),
        without=NO_BIASES,
        stored=mla_stored,
    ),
)
