"""Shapes of a key-value cache that a graph leaves open, although a runtime must know them to make an empty one."""

from __future__ import annotations

import json
from pathlib import Path

import onnx_ir as ir


def pin_head_size(graph: ir.Graph, genai_config: Path) -> None:
    """Write the values a head into the shapes of keys and values, where they are a name.

    onnxruntime-genai's builder leaves them open for quantized caches; transformers.js would take 0 for that.

    Args:
        graph: edited in place.
        genai_config: which says the size; without the file nothing changes.
    """
    if not genai_config.is_file():
        return
    size = json.loads(genai_config.read_text(encoding="utf-8"))["model"]["decoder"].get("head_size")
    for value in [*graph.inputs, *graph.outputs]:
        is_cache = str(value.name).endswith((".key", ".value"))
        if is_cache and size and value.shape is not None and not isinstance(value.shape[-1], int):
            value.shape = ir.Shape([*value.shape[:-1], int(size)])
