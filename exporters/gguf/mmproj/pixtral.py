"""Pixtral's tower in Mistral Small 3.1 and later, and in the Llava that Pixtral is in transformers.

Source: LlavaVisionModel in llama.cpp's conversion/llava.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from exporters.gguf.mmproj.tower import Row, Sizes, Source, Tower, Value
from signround_edge.errors import UserError

_TOWER, _PROJECTOR = "model.vision_tower", "model.multi_modal_projector"
_NORM_EPS = 1e-5  # of every norm, by transformers' code
_BREAK = "[IMG_BREAK]"  # ends each row of an image
_LAYER = {
    "attention_norm": "ln1",
    "ffn_norm": "ln2",
    "attention.v_proj": "attn_v",
    "attention.o_proj": "attn_out",
    "feed_forward.gate_proj": "ffn_gate",
    "feed_forward.up_proj": "ffn_up",
    "feed_forward.down_proj": "ffn_down",
}
_PROJECTION = {
    "norm": "mm.input_norm",
    "patch_merger.merging_layer": "mm.patch_merger",
    "linear_1": "mm.1",
    "linear_2": "mm.2",
}


def _paired(heads: int) -> Callable[[Tensor], Tensor]:
    """Rows of Q or K as llama.cpp rotates them: those that are rotated together side by side in each head."""

    def change(weight: Tensor) -> Tensor:
        by_half = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
        return by_half.transpose(1, 2).reshape(weight.shape)

    return change


def _rows(source: Source) -> Iterator[Row]:
    vision = source.vision
    paired = _paired(vision["num_attention_heads"])
    yield from source.rows(f"{_TOWER}.patch_conv", "v.patch_embd")
    yield from source.rows(f"{_TOWER}.ln_pre", "v.pre_ln")
    for layer in range(vision["num_hidden_layers"]):
        name = f"{_TOWER}.transformer.layers.{layer}"
        for letter in "qk":
            yield Row(f"{name}.attention.{letter}_proj.weight", f"v.blk.{layer}.attn_{letter}.weight", paired)
        for theirs, ours in _LAYER.items():
            yield from source.rows(f"{name}.{theirs}", f"v.blk.{layer}.{ours}")
    for theirs, ours in _PROJECTION.items():
        yield from source.rows(f"{_PROJECTOR}.{theirs}", ours)
    token = _break_token(source.folder)
    yield Row(source.embedding, "v.token_embd.img_break", lambda table: table[token])


def _keys(source: Source) -> dict[str, Value]:
    vision, config = source.vision, source.config
    source.require("model_type of vision_config", vision["model_type"], "pixtral")
    source.require("vision_feature_layer", config["vision_feature_layer"], -1)
    source.require("projector_hidden_act", config["projector_hidden_act"], "gelu", "gelu_pytorch_tanh")
    source.require("rope_theta of vision_config", vision["rope_parameters"]["rope_theta"], 10000, None)
    source.require("hidden_act of vision_config", vision["hidden_act"], "silu", "gelu")
    merged: dict[str, Value] = {}
    if "spatial_merge_size" in config:
        merged["clip.vision.spatial_merge_size"] = int(config["spatial_merge_size"])
    return {
        "clip.projector_type": "pixtral",
        "clip.vision.attention.layer_norm_epsilon": _NORM_EPS,
        f"clip.use_{vision['hidden_act']}": True,
        **merged,
    }


def _break_token(folder: Path) -> int:
    """The number of [IMG_BREAK]; UserError where the tokenizer has none."""
    file = folder / "tokenizer.json"
    try:
        added: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["added_tokens"]
        return next(int(token["id"]) for token in added if token["content"] == _BREAK)
    except StopIteration as error:
        raise UserError(f"{file} has no token {_BREAK}, which ends the rows of an image; leave --mmproj out") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} cannot be read ({error}); download it again") from error


ROWS = (Tower(("mistral3", "llava"), _rows, _keys, Sizes.of),)
