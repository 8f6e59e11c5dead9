"""config.json of a Hugging Face model folder, read here and nowhere else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from signround_edge.errors import UserError

CONFIG_FILE = "config.json"


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder or of a run's config folder. UserError when it is missing or no JSON object."""
    file = folder / CONFIG_FILE
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{file} cannot be read ({error.strerror}); give a complete model folder, or run `quantize` again"
        ) from error
    except ValueError as error:
        raise UserError(
            f"{file} is not JSON ({error}); give a complete model folder, or run `quantize` again"
        ) from error
    if not isinstance(config, dict):
        raise UserError(f"{file} is not a JSON object; give a complete model folder, or run `quantize` again")
    return config


def head_dim(config: dict[str, Any]) -> int:
    """Values a head of q and k."""
    explicit = config.get("head_dim")
    return int(explicit) if explicit else int(config["hidden_size"]) // int(config["num_attention_heads"])
