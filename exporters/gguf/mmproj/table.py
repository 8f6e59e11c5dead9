"""The table of vision towers, gathered from the modules of this folder."""

from __future__ import annotations

from exporters.gguf.mmproj import gemma4, pixtral, qwen, siglip
from exporters.gguf.mmproj.tower import Tower

TOWERS: dict[str, Tower] = {
    model_type: tower
    for module in (siglip, qwen, pixtral, gemma4)
    for tower in module.ROWS
    for model_type in tower.model_types
}

CONVERTER = "convert_hf_to_gguf.py MODEL --mmproj --outtype f16"


def way(model_type: str) -> str:
    """In a few words, how to get the mmproj file of a whole model."""
    if model_type in TOWERS:
        return "--mmproj FILE --mmproj-from MODEL writes the file that does"
    return f"llama.cpp's converter makes the file that does: `{CONVERTER}`"
