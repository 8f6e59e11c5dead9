"""Small models that read images, as they are published: names, tokens and files that transformers no longer writes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from benchmarks.models.small_models import MODELS, SmallModel, build

PREPROCESSOR = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.6, 0.7], "size": {"longest_edge": 128}}


def _with(name: str, vision: dict[str, Any], **top: Any) -> SmallModel:
    row = MODELS[name]
    return replace(row, config={**row.config, "vision_config": {**row.config["vision_config"], **vision}, **top})


_BREAK = "[IMG_BREAK]"
_MISTRAL_TEXT = {**MODELS["mistral3_mm"].config["text_config"], "vocab_size": 3080}
# Names of projector tensors are only known to the converter up to the number of layers.
SMALL = {
    "gemma3": _with("gemma3_mm", {"vision_use_head": False}),
    "smolvlm": MODELS["smolvlm"],
    "qwen2_vl": _with("qwen2_vl", {"depth": 4}),
    "qwen2_5_vl": _with("qwen2_5_vl", {"depth": 4, "fullatt_block_indexes": [1, 3]}),
    "qwen3_vl": _with("qwen3_vl", {"depth": 3, "deepstack_visual_indexes": [1]}),
    "qwen3_5": MODELS["qwen3_5_mm"],
    "mistral3": _with("mistral3_mm", {"num_hidden_layers": 3, "hidden_act": "silu"}, text_config=_MISTRAL_TEXT),
    "gemma4": MODELS["gemma4_mm"],
}


def published(name: str, folder: Path) -> Path:
    """A small random model, as its family is published."""
    MODELS[f"published {name}"] = SMALL[name]
    try:
        build(f"published {name}", folder)
    finally:
        del MODELS[f"published {name}"]
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    if name == "gemma3":
        file = folder / "model.safetensors"
        inside = {k.replace("vision_tower.", "vision_tower.vision_model."): v for k, v in load_file(file).items()}
        save_file(inside, file, {"format": "pt"})
    if name == "mistral3":
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.add_special_tokens({"additional_special_tokens": [_BREAK]})
        tokenizer.save_pretrained(folder)
    return folder
