"""Gemma 4's vision tower, of the models without one for sound.

Source: Gemma4VisionAudioModel in llama.cpp's conversion/gemma.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from exporters.gguf.mmproj.tower import Config, Row, Sizes, Source, Tower, Value

_TOWER = "model.vision_tower"
_IMAGE = 224  # the converter's; llama.cpp takes images of every size
_ROPE_BASE = 100.0  # by llama.cpp's code
_POOLING = 3  # by llama.cpp's code
_LAYER = {
    "input_layernorm": "ln1",
    "post_attention_layernorm": "attn_post_norm",
    "pre_feedforward_layernorm": "ln2",
    "post_feedforward_layernorm": "ffn_post_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_proj.linear": "attn_q",
    "self_attn.k_proj.linear": "attn_k",
    "self_attn.v_proj.linear": "attn_v",
    "self_attn.o_proj.linear": "attn_out",
    "mlp.gate_proj.linear": "ffn_gate",
    "mlp.up_proj.linear": "ffn_up",
    "mlp.down_proj.linear": "ffn_down",
}
_LIMITS = ("input_max", "input_min", "output_max", "output_min")  # of linear layers that clamp


def _channels_first(patch: int) -> Callable[[Tensor], Tensor]:
    """A linear layer over the values of a patch, channel by channel for each pixel, as the convolution that it is."""
    return lambda weight: weight.reshape(weight.shape[0], patch, patch, 3).permute(0, 3, 1, 2)


def _rows(source: Source) -> Iterator[Row]:
    patches = f"{_TOWER}.patch_embedder"
    yield Row(f"{patches}.input_proj.weight", "v.patch_embd.weight", _channels_first(source.vision["patch_size"]))
    yield Row(f"{patches}.position_embedding_table", "v.position_embd.weight", None, True)
    for layer in range(source.vision["num_hidden_layers"]):
        for name, ours in _LAYER.items():
            whole = f"{_TOWER}.encoder.layers.{layer}.{name}"
            yield from source.rows(whole, f"v.blk.{layer}.{ours}")
            for limit in _LIMITS:
                stored = f"{whole.removesuffix('.linear')}.{limit}"
                if name.endswith(".linear") and stored in source.names:
                    yield Row(stored, f"v.blk.{layer}.{ours}.{limit}", lambda scalar: scalar.reshape(1))
    for name in ("std_bias", "std_scale"):
        if f"{_TOWER}.{name}" in source.names:
            yield Row(f"{_TOWER}.{name}", f"v.{name}")
    yield from source.rows("model.embed_vision.embedding_projection", "mm.input_projection")


def _keys(source: Source) -> dict[str, Value]:
    vision = source.vision
    source.require("audio_config", source.config.get("audio_config"), None)
    source.require("hidden_activation of vision_config", vision["hidden_activation"], "gelu_pytorch_tanh")
    source.require("pooling_kernel_size of vision_config", vision["pooling_kernel_size"], _POOLING)
    source.require("rope_theta of vision_config", vision["rope_parameters"]["rope_theta"], _ROPE_BASE)
    return {
        "clip.vision.projector_type": "gemma4v",
        "clip.use_gelu": True,  # not in the converter's file, with which llama.cpp computes x·sigmoid(1.702·x) instead
        "clip.vision.attention.layer_norm_epsilon": float(vision["rms_norm_eps"]),
    }


def _sizes(vision: Config) -> Sizes:
    return Sizes.of({**vision, "image_size": _IMAGE})


ROWS = (Tower(("gemma4",), _rows, _keys, _sizes),)
