"""Qwen3-Next and Qwen3.5: gated delta nets in most layers, gated attention in the others; dense and with experts."""

from __future__ import annotations

from collections.abc import Iterator

import gguf
import numpy as np

from exporters.gguf.families.family import NO_OUTPUT_BIAS, Family, Stored, add_shared_expert
from exporters.gguf.families.newer import add_recurrent_layers
from exporters.gguf.families.rope import rope_parameters
from exporters.gguf.families.row_orders import Config, RowOrder
from exporters.gguf.families.windows import full_attention_period
from exporters.gguf.functions import MINUS_EXP, ONE_PLUS

_RESPELLED = ((".linear_attn.dt_bias", ".linear_attn.dt_proj.bias"),)
_SECTIONS = [11, 11, 10]  # of the published models; text has the same position in all of them


def _keys(writer: gguf.GGUFWriter, config: Config) -> None:
    """Source: `Qwen3NextModel.set_gguf_parameters` in conversion/qwen.py."""
    heads, dim = int(config["linear_num_value_heads"]), int(config["linear_value_head_dim"])
    writer.add_ssm_conv_kernel(int(config["linear_conv_kernel_dim"]))
    writer.add_ssm_state_size(int(config["linear_key_head_dim"]))
    writer.add_ssm_group_count(int(config["linear_num_key_heads"]))
    writer.add_ssm_time_step_rank(heads)
    writer.add_ssm_inner_size(heads * dim)
    add_recurrent_layers(writer, [kind == "linear_attention" for kind in config["layer_types"]])
    period = full_attention_period(config, "linear_attention")
    if period is not None:
        writer.add_full_attention_interval(period)


def _sections(writer: gguf.GGUFWriter, config: Config) -> None:
    sections = rope_parameters(config).get("mrope_section") or _SECTIONS
    writer.add_rope_dimension_sections([*sections, 0, 0][:4])


def _next_keys(writer: gguf.GGUFWriter, config: Config) -> None:
    _keys(writer, config)
    add_shared_expert(writer, config)


def _dense_keys(writer: gguf.GGUFWriter, config: Config) -> None:
    _keys(writer, config)
    _sections(writer, config)


def _moe_keys(writer: gguf.GGUFWriter, config: Config) -> None:
    _next_keys(writer, config)
    _sections(writer, config)


def _problems(config: Config) -> Iterator[str]:
    if config["linear_value_head_dim"] != config["linear_key_head_dim"]:
        yield "has key and value heads of the same size in its delta nets, this model's differ"


def _next_problems(config: Config) -> Iterator[str]:
    yield from _problems(config)
    if not config["norm_topk_prob"]:
        yield "lets the weights of the chosen experts add up to 1, this model does not (norm_topk_prob)"


def _stored(config: Config, name: str, shape: tuple[int, ...]) -> tuple[Stored, ...] | None:
    """Value heads lie by the key head that they share, and are stored with those of one key head as far apart as
    there are key heads. Source: `_LinearAttentionVReorderBase` in conversion/qwen.py.
    """
    if ".linear_attn." not in name:
        return _norm(name)
    key_heads, heads = int(config["linear_num_key_heads"]), int(config["linear_num_value_heads"])
    if key_heads == heads:
        return _delta_net(name, None)
    values = _far_apart(key_heads, heads, int(config["linear_value_head_dim"]))
    if name.endswith(("in_proj_qkv.weight", "conv1d.weight")):
        keys = 2 * key_heads * int(config["linear_key_head_dim"])
        return (Stored(rows=np.concatenate([np.arange(keys, dtype=np.intp), keys + values])),)
    if name.endswith("in_proj_z.weight"):
        return (Stored(rows=values),)
    if name.endswith("out_proj.weight"):
        return (Stored(columns=values),)
    return _delta_net(name, _far_apart(key_heads, heads, 1))


def _next_stored(config: Config, name: str, shape: tuple[int, ...]) -> tuple[Stored, ...] | None:
    """In Qwen3-Next a key head's rows are: its query, its key, its values, its gates."""
    if not name.endswith("in_proj_qkvz.weight"):
        return _delta_net(name, None) if ".linear_attn." in name else _norm(name)
    block = name.split(".")[2]
    keys, dim = int(config["linear_num_key_heads"]), int(config["linear_key_head_dim"])
    rows = np.arange(shape[0], dtype=np.intp).reshape(keys, -1)
    values = (rows.shape[1] - 2 * dim) // 2
    queries, own, of_values, gates = np.split(rows, [dim, 2 * dim, 2 * dim + values], axis=1)
    return (
        Stored(f"blk.{block}.attn_qkv.weight", np.concatenate([queries.ravel(), own.ravel(), of_values.ravel()])),
        Stored(f"blk.{block}.attn_gate.weight", gates.ravel()),
    )


def _norm(name: str) -> tuple[Stored, ...] | None:
    return (Stored(function=ONE_PLUS),) if name.endswith("norm.weight") else None


def _delta_net(name: str, heads: RowOrder | None) -> tuple[Stored, ...] | None:
    """What all of these models store alike; `heads` orders what has a number or a row for each head."""
    if name.endswith(".A_log"):
        return (Stored(rows=heads, function=MINUS_EXP),)
    if name.endswith((".dt_bias", ".in_proj_a.weight", ".in_proj_b.weight")):
        return (Stored(rows=heads),)
    return None


def _far_apart(key_heads: int, heads: int, dim: int) -> RowOrder:
    """Order of rows, `dim` for each value head: the first value head of each key head, then the second of each, …"""
    order = np.arange(heads * dim, dtype=np.intp).reshape(key_heads, -1, dim)
    return order.swapaxes(0, 1).reshape(-1)


ROWS = (
    Family(
        "qwen3_next",
        gguf.MODEL_ARCH.QWEN3NEXT,
        keys=_next_keys,
        problems=_next_problems,
        partial_rotary=True,
        without=NO_OUTPUT_BIAS,
        stored=_next_stored,
        respelled=_RESPELLED,
    ),
    Family(
        "qwen3_5_text",
        gguf.MODEL_ARCH.QWEN35,
        keys=_dense_keys,
        problems=_problems,
        partial_rotary=True,
        without=NO_OUTPUT_BIAS,
        stored=_stored,
        respelled=_RESPELLED,
    ),
    Family(
        "qwen3_5_moe_text",
        gguf.MODEL_ARCH.QWEN35MOE,
        keys=_moe_keys,
        problems=_problems,
        partial_rotary=True,
        without=NO_OUTPUT_BIAS,
        stored=_stored,
        respelled=_RESPELLED,
    ),
)
