"""Mixtures of experts as DeepSeek has them, which others have taken over: shared experts, dense layers first."""

from __future__ import annotations

import gguf

from exporters.gguf.families.family import Stored, add_expert_counts
from exporters.gguf.families.row_orders import Config


def add_experts(writer: gguf.GGUFWriter, config: Config) -> None:
    """How many experts there are, how wide they are, in which layers, and the factor on their outputs."""
    add_expert_counts(writer, config)
    writer.add_leading_dense_block_count(int(config["first_k_dense_replace"]))
    writer.add_expert_feed_forward_length(int(config["moe_intermediate_size"]))
    writer.add_expert_shared_count(int(config["n_shared_experts"]))
    writer.add_expert_weights_scale(float(config["routed_scaling_factor"]))


def add_sigmoid_experts(writer: gguf.GGUFWriter, config: Config) -> None:
    """The same, with how experts are chosen: each by a sigmoid, in groups (DeepSeek V3)."""
    add_experts(writer, config)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    writer.add_expert_group_count(int(config["n_group"]))
    writer.add_expert_group_used_count(int(config["topk_group"]))
    if config["norm_topk_prob"]:
        writer.add_expert_weights_norm(True)


def score_bias(name: str) -> tuple[Stored, ...] | None:
    """Where the bias lies that counts when experts are chosen; None for other parameters."""
    if not name.endswith(".e_score_correction_bias"):
        return None
    return (Stored(f"blk.{name.split('.')[2]}.exp_probs_b.bias"),)
