"""The model families whose GGUF metadata is built in, and which of their rows llama.cpp stores in another order.

Source of the facts: conversion/llama.py and conversion/qwen.py of llama.cpp (its Hugging Face converter).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from signround_edge.errors import UserError

RowOrder = NDArray[np.intp]


@dataclass(frozen=True)
class Family:
    """One row: how a Hugging Face `model_type` appears in GGUF.

    Attributes:
        model_type: `model_type` of config.json.
        arch: llama.cpp's architecture.
        interleaved_rope: llama.cpp rotates neighbouring pairs (Meta's original layout), so the rows of q and k are
            stored in that order; otherwise both rotate halves and rows stay.
        output_bias: llama.cpp's graph has a bias behind the attention output.
    """

    model_type: str
    arch: gguf.MODEL_ARCH
    interleaved_rope: bool
    output_bias: bool


_ROWS = (
    Family("llama", gguf.MODEL_ARCH.LLAMA, interleaved_rope=True, output_bias=True),
    Family("mistral", gguf.MODEL_ARCH.LLAMA, interleaved_rope=True, output_bias=True),
    Family("qwen2", gguf.MODEL_ARCH.QWEN2, interleaved_rope=False, output_bias=False),
    Family("qwen3", gguf.MODEL_ARCH.QWEN3, interleaved_rope=False, output_bias=False),
)

FAMILIES = {family.model_type: family for family in _ROWS}


def read_config(config_dir: Path) -> dict[str, Any]:
    """config.json of a run's config folder. UserError when it is missing or not JSON."""
    file = config_dir / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); run `quantize` again") from error
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({error}); run `quantize` again") from error
    if not isinstance(config, dict):
        raise UserError(f"{file} is not a JSON object; run `quantize` again")
    return config


def family_of(config: dict[str, Any]) -> Family:
    """The built-in family of a config. UserError for others, with the way out."""
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None:
        raise UserError(
            f"no built-in GGUF metadata for architecture {config.get('model_type')!r} (there is for "
            f"{', '.join(FAMILIES)}); make an f16 GGUF with llama.cpp's convert_hf_to_gguf.py and give it as --template"
        )
    return family


def head_dim(config: dict[str, Any]) -> int:
    """Values a head of q and k."""
    explicit = config.get("head_dim")
    return int(explicit) if explicit else int(config["hidden_size"]) // int(config["num_attention_heads"])


def interleaved_rows(rows: int, heads: int) -> RowOrder:
    """Row order of q or k for rotation of neighbouring pairs: stored row i is Hugging Face's row order[i].

    Each head's first and second half are interleaved. Source: `LlamaModel.permute` in conversion/llama.py.
    """
    order = np.arange(rows, dtype=np.intp).reshape(heads, 2, rows // heads // 2)
    return order.swapaxes(1, 2).reshape(-1)


def row_order(family: Family, config: dict[str, Any], hf_name: str, rows: int) -> RowOrder | None:
    """The order in which llama.cpp stores a parameter's rows, or None when it is Hugging Face's."""
    if not family.interleaved_rope:
        return None
    heads = int(config["num_attention_heads"])
    projection = hf_name.rpartition(".")[0].rpartition(".")[2]
    if projection == "q_proj":
        return interleaved_rows(rows, heads)
    if projection == "k_proj":
        return interleaved_rows(rows, int(config.get("num_key_value_heads") or heads))
    return None
