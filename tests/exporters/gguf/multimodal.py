"""Small models that read images, as they are published: names, tokens and files that transformers no longer writes.

And what transformers makes of an image with them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoTokenizer

from benchmarks.models.small_models import MODELS, SmallModel, build_model

BREAK = "[IMG_BREAK]"
# Numbers that no family has, so that none is assumed. Idefics' images are tiles of 64, four of this size.
PREPROCESSOR = {
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.5, 0.6, 0.7],
    "size": {"longest_edge": 128},
    "image_seq_length": 4,
}


@dataclass(frozen=True)
class Small:
    """A small model.

    Attributes:
        row: what it is built of.
        image: [height, width] of an image that no preprocessing scales.
    """

    row: SmallModel
    image: tuple[int, int]


def _like(model: str, image: tuple[int, int], vision: dict[str, Any], **top: Any) -> Small:
    """A model of `benchmarks.models.small_models` with other settings of its vision tower, and of itself."""
    row = MODELS[model]
    vision = {**row.config["vision_config"], **vision}
    return Small(replace(row, config={**row.config, "vision_config": vision, **top}), image)


def _text(model: str, **changed: Any) -> dict[str, Any]:
    return {**MODELS[model].config["text_config"], **changed}


_PIXTRAL = {"num_hidden_layers": 3, "hidden_act": "silu"}
# The converter knows names of projector layers up to the number of the tower's layers, so some have more of those here.
SMALL = {
    "gemma3": _like("gemma3_mm", (64, 64), {}),
    "smolvlm": _like("smolvlm", (128, 128), {}),
    "qwen2_vl": _like("qwen2_vl", (112, 140), {"depth": 4}),
    "qwen2_5_vl": _like("qwen2_5_vl", (224, 196), {"depth": 4, "fullatt_block_indexes": [1, 3]}),
    "qwen3_vl": _like("qwen3_vl", (128, 160), {"depth": 3, "deepstack_visual_indexes": [1]}),
    "qwen3_5": _like("qwen3_5_mm", (128, 160), {}),
    "mistral3": _like("mistral3_mm", (96, 128), _PIXTRAL, text_config=_text("mistral3_mm", vocab_size=3080)),
    "gemma4": _like("gemma4_mm", (480, 432), {}),
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
_LLAVA = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
# The same towers in other models.
ALIKE = {
    "idefics3": Small(replace(SMALL["smolvlm"].row, model_type="idefics3"), (128, 128)),
    "llava": Small(
        SmallModel("llava", {**SMALL["mistral3"].row.config, **_LLAVA}, reads_images=True), SMALL["mistral3"].image
    ),
    "qwen3_vl_moe": _like("qwen3_vl", (128, 160), {}, text_config=_text("qwen3_vl", **_EXPERTS)),
}
ALIKE["qwen3_vl_moe"] = Small(replace(ALIKE["qwen3_vl_moe"].row, model_type="qwen3_vl_moe"), (128, 160))


def publish(name: str, folder: Path) -> Path:
    """A small random model, as its family is published."""
    build_model({**SMALL, **ALIKE}[name].row, folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    if name == "gemma3":
        file = folder / "model.safetensors"
        named = {key.replace("vision_tower.", "vision_tower.vision_model."): t for key, t in load_file(file).items()}
        save_file(named, file, {"format": "pt"})
    if name in ("mistral3", "llava"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.add_special_tokens({"additional_special_tokens": [BREAK]})
        tokenizer.save_pretrained(folder)
    return folder


def random_image(name: str) -> NDArray[np.uint8]:
    """[height, width, 3]."""
    found: NDArray[np.uint8] = np.random.default_rng(0).integers(0, 256, (*SMALL[name].image, 3), dtype=np.uint8)
    return found


@torch.no_grad()
def reference_embeddings(name: str, folder: Path, image: NDArray[np.uint8]) -> NDArray[np.float32]:
    """What transformers gives the language model for an image, f32 [tokens, width]; without [IMG_BREAK].

    The width is several times the language model's where several of its layers get a share (Qwen3-VL).
    """
    model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    mean, std = (torch.tensor(PREPROCESSOR[key]).reshape(3, 1, 1) for key in ("image_mean", "image_std"))
    pixels = (torch.from_numpy(image).permute(2, 0, 1) / 255 - mean) / std
    found = model.model.get_image_features(**_arguments(name, pixels, model.config.vision_config))
    parts = [found.pooler_output, *(getattr(found, "deepstack_features", None) or [])]
    return torch.cat([_joined(part) for part in parts], dim=1).numpy()


def _arguments(name: str, pixels: Tensor, vision: Any) -> dict[str, Tensor]:
    """What an image processor would make of pixels [3, height, width]."""
    _, height, width = pixels.shape
    if name == "gemma3":
        return {"pixel_values": pixels[None]}
    if name == "mistral3":
        return {"pixel_values": pixels[None], "image_sizes": torch.tensor([[height, width]])}
    if name == "smolvlm":
        tiles = pixels.unfold(1, 64, 64).unfold(2, 64, 64).permute(1, 2, 0, 3, 4)
        return {"pixel_values": tiles.reshape(1, -1, 3, 64, 64)}
    size = vision.patch_size
    rows, columns = height // size, width // size
    patches = pixels.reshape(3, rows, size, columns, size)
    if name == "gemma4":
        y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        return {
            "pixel_values": patches.permute(1, 3, 2, 4, 0).reshape(1, rows * columns, -1),
            "image_position_ids": torch.stack([x, y], -1).reshape(1, -1, 2),
        }
    merged = vision.spatial_merge_size
    patches = pixels.reshape(3, rows // merged, merged, size, columns // merged, merged, size)
    one_frame = patches.permute(1, 4, 2, 5, 0, 3, 6).reshape(rows * columns, 3, 1, size, size)
    return {
        "pixel_values": one_frame.expand(-1, -1, 2, -1, -1).reshape(rows * columns, -1),
        "image_grid_thw": torch.tensor([[1, rows, columns]]),
    }


def _joined(part: Any) -> Tensor:
    tensors = part if isinstance(part, tuple | list) else [part]
    return torch.cat([tensor.reshape(-1, tensor.shape[-1]) for tensor in tensors])
