"""Nemotron-H: each layer is Mamba-2, attention without positions, or a feed-forward network; also with experts."""

from __future__ import annotations

from collections.abc import Iterator

import gguf

from exporters.gguf.families.family import RELU_SQUARED, Family, Stored
from exporters.gguf.families.llama import interleaved_order
from exporters.gguf.families.mamba2 import ANY_LENGTH, RESPELLED, Mamba, heads_by_layer, mamba_problems
from exporters.gguf.families.row_orders import Config

_BACKBONE = ("model.layers.", "backbone.layers.")
_EXPERTS = {"up_proj.weight": "ffn_up_exps.weight", "down_proj.weight": "ffn_down_exps.weight"}


def _sizes(config: Config) -> Mamba:
    heads, dim = int(config["mamba_num_heads"]), int(config["mamba_head_dim"])
    kernel, state, groups = (int(config[key]) for key in ("conv_kernel", "ssm_state_size", "n_groups"))
    return Mamba(kernel, state, groups, heads, heads * dim)


def _derived(config: Config) -> Config:
    kinds = config["layers_block_type"]
    lengths = {"mlp": int(config["intermediate_size"]), "moe": int(config["moe_intermediate_size"])}
    return {
        "num_hidden_layers": len(kinds),
        "norm_eps": config["layer_norm_epsilon"],
        "hidden_act": config["mlp_hidden_act"],
        "max_position_embeddings": ANY_LENGTH,
        "feed_forward_by_layer": [lengths.get(kind, 0) for kind in kinds],
        **heads_by_layer(kinds, config),
    }


def _keys(writer: gguf.GGUFWriter, config: Config) -> None:
    writer.add_rope_scaling_finetuned(False)
    _sizes(config).add_keys(writer)


def _moe_keys(writer: gguf.GGUFWriter, config: Config) -> None:
    _keys(writer, config)
    writer.add_expert_count(int(config["n_routed_experts"]))
    writer.add_expert_used_count(int(config["num_experts_per_tok"]))
    writer.add_expert_group_count(int(config["n_group"]))
    writer.add_expert_group_used_count(int(config["topk_group"]))
    writer.add_expert_feed_forward_length(int(config["moe_intermediate_size"]))
    writer.add_expert_shared_feed_forward_length(int(config["moe_shared_expert_intermediate_size"]))
    writer.add_expert_shared_count(int(config["n_shared_experts"]))
    writer.add_expert_weights_norm(bool(config["norm_topk_prob"]))
    writer.add_expert_weights_scale(float(config["routed_scaling_factor"]))
    if config["moe_latent_size"] is not None:
        writer.add_moe_latent_size(int(config["moe_latent_size"]))


def _problems(config: Config) -> Iterator[str]:
    # transformers takes the least time step from another entry; see `_notes`.
    yield from mamba_problems(config["use_conv_bias"], (0, float("inf")))


def _moe_problems(config: Config) -> Iterator[str]:
    yield from _problems(config)
    if "mlp" in config["layers_block_type"]:
        yield "has experts in all feed-forward layers or in none, this model in some"


def _notes(config: Config) -> Iterator[str]:
    least = config["time_step_min"]
    if least > 0:
        yield (
            f"llama.cpp's nemotron_h has no least time step, transformers' model has one of {least}; results may "
            "differ from the original"
        )


def _stored(config: Config, name: str, shape: tuple[int, ...]) -> tuple[Stored, ...] | None:
    if ".mixer.experts." in name:
        parts = name.split(".")
        return (Stored(f"blk.{parts[2]}.{_EXPERTS['.'.join(parts[-2:])]}"),)
    return _sizes(config).stored(name, shape)


def _with_experts(config: Config) -> Family | None:
    return _WITH_EXPERTS if "moe" in config["layers_block_type"] else None


_WITH_EXPERTS = Family(
    "nemotron_h",
    gguf.MODEL_ARCH.NEMOTRON_H_MOE,
    interleaved_order,  # without rotation it changes nothing, but the converter's files have it
    derived=_derived,
    keys=_moe_keys,
    problems=_moe_problems,
    notes=_notes,
    layer_norm=True,  # the key that llama.cpp reads; it is an RMS norm
    rotary=False,
    activations=RELU_SQUARED,
    stored=_stored,
    respelled=(_BACKBONE, *RESPELLED, (".e_score_correction_bias", ".e_score_correction.bias")),
)

ROWS = (
    Family(
        "nemotron_h",
        gguf.MODEL_ARCH.NEMOTRON_H,
        interleaved_order,
        derived=_derived,
        keys=_keys,
        problems=_problems,
        notes=_notes,
        layer_norm=True,
        rotary=False,
        activations=RELU_SQUARED,
        without=(".mixer.in_proj.bias", ".mixer.out_proj.bias"),
        stored=_stored,
        respelled=(_BACKBONE, *RESPELLED),
        elsewhere=_with_experts,
    ),
)
