"""SigLIP's tower in Gemma 3, SmolVLM and Idefics 3.

Source: Gemma3VisionModel in llama.cpp's conversion/gemma.py, SmolVLMModel in conversion/smolvlm.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from exporters.gguf.mmproj.tower import SIGLIP_LAYER, Row, Sizes, Source, Tower, Value

_GEMMA3_POOLING = 4  # what llama.cpp assumes: patches a side that become one


def _encoder(source: Source, tower: str) -> Iterator[Row]:
    # In f32, which llama.cpp wants: https://github.com/ggml-org/llama.cpp/issues/13025
    yield from source.rows(f"{tower}.embeddings.patch_embedding", "v.patch_embd", is_f32=True)
    yield from source.rows(f"{tower}.embeddings.position_embedding", "v.position_embd", is_f32=True)
    for layer in range(source.vision["num_hidden_layers"]):
        for name, ours in SIGLIP_LAYER.items():
            yield from source.rows(f"{tower}.encoder.layers.{layer}.{name}", f"v.blk.{layer}.{ours}")
    yield from source.rows(f"{tower}.post_layernorm", "v.post_ln")


def _gemma3_rows(source: Source) -> Iterator[Row]:
    yield from _encoder(source, "model.vision_tower")
    projector = "model.multi_modal_projector"
    yield Row(f"{projector}.mm_input_projection_weight", "mm.input_projection.weight")
    # transformers' norm multiplies by 1 + weight, llama.cpp's by the weight.
    yield Row(f"{projector}.mm_soft_emb_norm.weight", "mm.soft_emb_norm.weight", lambda weight: weight + 1)


def _gemma3_keys(source: Source) -> dict[str, Value]:
    vision = source.vision
    source.require("hidden_act of vision_config", vision["hidden_act"], "gelu_pytorch_tanh")
    patches = vision["image_size"] // vision["patch_size"]
    pooling = patches // math.isqrt(source.config["mm_tokens_per_image"])
    scale: dict[str, Value] = {} if pooling == _GEMMA3_POOLING else {"clip.vision.projector.scale_factor": pooling}
    return {
        "clip.projector_type": "gemma3",
        "clip.vision.attention.layer_norm_epsilon": float(vision["layer_norm_eps"]),
        "clip.use_gelu": True,
        **scale,
    }


def _idefics3_rows(source: Source) -> Iterator[Row]:
    yield from _encoder(source, "model.vision_model")
    yield from source.rows("model.connector.modality_projection.proj", "mm.model.fc")


def _idefics3_keys(source: Source) -> dict[str, Value]:
    vision = source.vision
    source.require("hidden_act of vision_config", vision["hidden_act"], "gelu_pytorch_tanh")
    return {
        "clip.projector_type": "idefics3",
        "clip.vision.attention.layer_norm_epsilon": float(vision["layer_norm_eps"]),
        "clip.vision.projector.scale_factor": int(source.config["scale_factor"]),
        "clip.use_gelu": True,
        "clip.vision.preproc_image_size": source.preprocessor.longest_edge or int(vision["image_size"]),
    }


ROWS = (
    Tower(("gemma3",), _gemma3_rows, _gemma3_keys, Sizes.of, ("model.vision_tower.head.",)),
    Tower(("idefics3", "smolvlm"), _idefics3_rows, _idefics3_keys, Sizes.of),
)
