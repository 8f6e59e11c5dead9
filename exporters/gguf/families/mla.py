"""Latent attention (MLA) as llama.cpp computes it: DeepSeek V2 and V3, GLM-4.7-Flash.

Keys and values of all heads are made of one latent vector. llama.cpp keeps that one, as if there were one head of keys:
it applies a head's part of `kv_b_proj` for keys to the query instead, and that for values to the sum over values.
"""

from __future__ import annotations

from collections.abc import Iterator

import gguf
import numpy as np

from exporters.gguf.families.experts import score_bias
from exporters.gguf.families.family import NO_OUTPUT_BIAS, Stored
from exporters.gguf.families.rope import rope_parameters
from exporters.gguf.families.row_orders import Config

NO_BIASES = (".q_a_proj.bias", ".kv_a_proj_with_mqa.bias", ".down_proj.bias", *NO_OUTPUT_BIAS)


def mla_derived(config: Config) -> Config:
    """One head of keys, of the latent vector and the rotated part."""
    rank, rotated = int(config["kv_lora_rank"]), int(config["qk_rope_head_dim"])
    return {
        "num_key_value_heads": 1,
        "head_dim": rotated,
        "key_length": rank + rotated,
        "value_length": rank,
        "num_experts": config["n_routed_experts"],
    }


def add_mla(writer: gguf.GGUFWriter, config: Config) -> None:
    """The sizes of latent attention."""
    rank = config["q_lora_rank"]
    if rank is not None:
        writer.add_q_lora_rank(int(rank))
    elif not _is_lite(config):
        writer.add_q_lora_rank(0)  # llama.cpp asks for it, and takes 0 for none
    writer.add_kv_lora_rank(int(config["kv_lora_rank"]))
    writer.add_key_length_mla(int(config["qk_nope_head_dim"]) + int(config["qk_rope_head_dim"]))
    writer.add_value_length_mla(int(config["v_head_dim"]))


def mla_problems(config: Config) -> Iterator[str]:
    """What of latent attention llama.cpp's graph does not compute."""
    if config["q_lora_rank"] is not None and _is_lite(config):
        yield (
            "takes a model with this number of layers for one without q_lora_rank, this model has "
            f"{config['num_hidden_layers']} layers and a q_lora_rank"
        )
    if config.get("rope_interleave") is False:
        yield "rotates neighbouring pairs, this model does not (rope_interleave)"
    rope = rope_parameters(config)
    if rope["rope_type"] not in ("default", "yarn"):
        yield "scales the rotation by YaRN or not at all, this model has another scaling"
    if rope["rope_type"] == "yarn":
        both = (rope.get("mscale") or 0, rope.get("mscale_all_dim") or 0)
        if both[0] != both[1] or not both[0] or rope.get("attention_factor") not in (None, 1):
            yield "has the same mscale as mscale_all_dim in YaRN, this model has not"


def mla_stored(config: Config, name: str, shape: tuple[int, ...]) -> tuple[Stored, ...] | None:
    """`kv_b_proj` [heads · (keys + values), rank] as two tensors: keys, transposed in each head, and values."""
    if not name.endswith(".kv_b_proj.weight"):
        return score_bias(name)
    heads, rank = int(config["num_attention_heads"]), shape[1]
    keys, values = int(config["qk_nope_head_dim"]), int(config["v_head_dim"])
    rows = np.arange(shape[0], dtype=np.intp).reshape(heads, keys + values)
    block = f"blk.{name.split('.')[2]}"
    return (
        Stored(f"{block}.attn_k_b.weight", rows[:, :keys].reshape(-1), shape=(heads, rank, keys), transposed=True),
        Stored(f"{block}.attn_v_b.weight", rows[:, keys:].reshape(-1), shape=(heads, values, rank)),
    )


def _is_lite(config: Config) -> bool:
    """Whether llama.cpp takes the model for DeepSeek-V2-Lite or the like, by `load_arch_hparams` in deepseek2.cpp."""
    layers = int(config["num_hidden_layers"])
    return layers in (26, 27) or (layers == 48 and int(config["vocab_size"]) == 128256)
