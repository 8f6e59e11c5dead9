"""The towers of Qwen2-VL, Qwen2.5-VL, Qwen3-VL and Qwen3.5.

Source: Qwen2VLVisionModel in llama.cpp's conversion/qwenvl.py, Qwen3VLVisionModel in conversion/qwen3vl.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

from torch import Tensor

from exporters.gguf.mmproj.tower import Config, Row, Sizes, Source, Tower, Value
from signround_edge.errors import UserError

_TOWER = "model.visual"
_NORM_EPS = 1e-6  # of every norm, by transformers' code
_IMAGE = 560  # of Qwen2-VL, which takes images of every size: the converter's, for llama.cpp's first run
_WINDOW = 112  # of Qwen2.5-VL's attention, by llama.cpp's code
_LAYER = {
    "norm1": "ln1",
    "norm2": "ln2",
    "attn.proj": "attn_out",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.linear_fc1": "ffn_up",
    "mlp.linear_fc2": "ffn_down",
}
_MERGER = {
    "ln_q": "v.post_ln",
    "norm": "v.post_ln",
    "mlp.0": "mm.0",
    "mlp.2": "mm.2",
    "linear_fc1": "mm.0",
    "linear_fc2": "mm.2",
}
_DEEPSTACK = {"norm": "norm", "linear_fc1": "fc1", "linear_fc2": "fc2"}


def _third(number: int) -> Callable[[Tensor], Tensor]:
    """Q, K or V of the three below one another."""
    return lambda qkv: qkv.chunk(3)[number]


def _frame(number: int) -> Callable[[Tensor], Tensor]:
    """The convolution of one of two frames: llama.cpp gives an image to both."""
    return lambda kernel: kernel[:, :, number]


def _common(source: Source) -> Iterator[Row]:
    source.require("temporal_patch_size of vision_config", source.vision["temporal_patch_size"], 2)
    patches = f"{_TOWER}.patch_embed.proj"
    yield Row(f"{patches}.weight", "v.patch_embd.weight", _frame(0))
    yield Row(f"{patches}.weight", "v.patch_embd.weight.1", _frame(1))
    for layer in range(source.vision["depth"]):
        for name, ours in _LAYER.items():
            yield from source.rows(f"{_TOWER}.blocks.{layer}.{name}", f"v.blk.{layer}.{ours}")
    for name, ours in _MERGER.items():
        yield from source.rows(f"{_TOWER}.merger.{name}", ours)


def _qwen2_rows(source: Source) -> Iterator[Row]:
    yield from _common(source)
    for layer in range(source.vision["depth"]):
        for row in source.rows(f"{_TOWER}.blocks.{layer}.attn.qkv", f"v.blk.{layer}.attn_qkv"):
            for number, letter in enumerate("qkv"):
                name = row.gguf_name.replace("attn_qkv", f"attn_{letter}")
                yield replace(row, gguf_name=name, change=_third(number))


def _qwen3_rows(source: Source) -> Iterator[Row]:
    yield from _common(source)
    yield Row(f"{_TOWER}.patch_embed.proj.bias", "v.patch_embd.bias")
    yield from source.rows(f"{_TOWER}.pos_embed", "v.position_embd", is_f32=True)
    for layer in range(source.vision["depth"]):
        yield from source.rows(f"{_TOWER}.blocks.{layer}.attn.qkv", f"v.blk.{layer}.attn_qkv")
    for number, layer in enumerate(_deepstack(source)):
        for name, ours in _DEEPSTACK.items():
            yield from source.rows(f"{_TOWER}.deepstack_merger_list.{number}.{name}", f"v.deepstack.{layer}.{ours}")


def _deepstack(source: Source) -> list[int]:
    """Layers whose output goes to the language model's first layers, too; Qwen3.5 has none."""
    return list(source.vision.get("deepstack_visual_indexes") or [])


def _qwen2_keys(source: Source) -> dict[str, Value]:
    source.require("hidden_act of vision_config", source.vision["hidden_act"], "quick_gelu")
    source.require("spatial_merge_size of vision_config", source.vision["spatial_merge_size"], 2)
    return {"clip.projector_type": "qwen2vl_merger", "clip.vision.attention.layer_norm_epsilon": _NORM_EPS}


def _qwen2_5_keys(source: Source) -> dict[str, Value]:
    vision = source.vision
    source.require("hidden_act of vision_config", vision["hidden_act"], "silu")
    source.require("spatial_merge_size of vision_config", vision["spatial_merge_size"], 2)
    source.require("window_size of vision_config", vision["window_size"], _WINDOW)
    whole = vision["fullatt_block_indexes"]
    period = whole[0] + 1 if whole else 0
    if not whole or whole != list(range(period - 1, vision["depth"], period)):
        raise UserError(
            f"{source.folder}: fullatt_block_indexes of vision_config is {whole}, and llama.cpp knows full attention "
            "in every nth layer only; leave --mmproj out"
        )
    return {
        "clip.projector_type": "qwen2.5vl_merger",
        "clip.use_silu": True,
        "clip.vision.n_wa_pattern": period,
        "clip.vision.attention.layer_norm_epsilon": _NORM_EPS,
    }


def _qwen3_keys(source: Source) -> dict[str, Value]:
    vision = source.vision
    source.require("hidden_act of vision_config", vision["hidden_act"], "gelu_pytorch_tanh")
    layers = _deepstack(source)
    return {
        "clip.projector_type": "qwen3vl_merger",
        "clip.use_gelu": True,
        "clip.vision.spatial_merge_size": int(vision["spatial_merge_size"]),
        "clip.vision.attention.layer_norm_epsilon": _NORM_EPS,
        "clip.vision.is_deepstack_layers": [layer in layers for layer in range(vision["depth"])],
    }


def _qwen2_sizes(vision: Config) -> Sizes:
    hidden = vision["embed_dim"]
    intermediate = int(hidden * vision["mlp_ratio"])
    return Sizes(vision["depth"], hidden, intermediate, vision["num_heads"], _IMAGE, vision["patch_size"])


def _qwen2_5_sizes(vision: Config) -> Sizes:
    sizes = (vision["depth"], vision["hidden_size"], vision["intermediate_size"], vision["num_heads"])
    return Sizes(*sizes, _IMAGE, vision["patch_size"])


def _qwen3_sizes(vision: Config) -> Sizes:
    side = math.isqrt(vision["num_position_embeddings"])
    return replace(_qwen2_5_sizes(vision), image=side * vision["patch_size"])


ROWS = (
    Tower(("qwen2_vl",), _qwen2_rows, _qwen2_keys, _qwen2_sizes),
    Tower(("qwen2_5_vl",), _qwen2_rows, _qwen2_5_keys, _qwen2_5_sizes),
    Tower(("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"), _qwen3_rows, _qwen3_keys, _qwen3_sizes),
)
