"""Small models that read images, as they are published: names, tokens and files that transformers no longer writes.

And what transformers makes of an image with them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoTokenizer

from benchmarks.models.small_models import MODELS, build_model

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
        model: name in `benchmarks.models.small_models`.
        vision, top: what else its vision tower and its config have.
        image: [height, width] of an image that no preprocessing scales.
    """

    model: str
    vision: dict[str, Any]
    image: tuple[int, int]
    top: dict[str, Any]


# The converter knows names of projector layers up to the number of the tower's layers, so some have more of those here.
SMALL = {
    "gemma3": Small("gemma3_mm", {}, (64, 64), {}),
    "smolvlm": Small("smolvlm", {}, (128, 128), {}),
    "qwen2_vl": Small("qwen2_vl", {"depth": 4}, (112, 140), {}),
    "qwen2_5_vl": Small("qwen2_5_vl", {"depth": 4, "fullatt_block_indexes": [1, 3]}, (224, 196), {}),
    "qwen3_vl": Small("qwen3_vl", {"depth": 3, "deepstack_visual_indexes": [1]}, (128, 160), {}),
    "qwen3_5": Small("qwen3_5_mm", {}, (128, 160), {}),
    "mistral3": Small(
        "mistral3_mm",
        {"num_hidden_layers": 3, "hidden_act": "silu"},
        (96, 128),
        {"text_config": {**MODELS["mistral3_mm"].config["text_config"], "vocab_size": 3080}},
    ),
    "gemma4": Small("gemma4_mm", {}, (480, 432), {}),
}


def publish(name: str, folder: Path) -> Path:
    """A small random model, as its family is published."""
    small = SMALL[name]
    row = MODELS[small.model]
    vision = {**row.config["vision_config"], **small.vision}
    build_model(row.with_config({**row.config, "vision_config": vision, **small.top}), folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    if name == "gemma3":
        file = folder / "model.safetensors"
        named = {key.replace("vision_tower.", "vision_tower.vision_model."): t for key, t in load_file(file).items()}
        save_file(named, file, {"format": "pt"})
    if name == "mistral3":
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
