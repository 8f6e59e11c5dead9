"""config.json of a Hugging Face model folder, read and written here and nowhere else."""

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


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """Write config.json into a folder."""
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def is_model_folder(folder: Path) -> bool:
    """Whether it holds a config.json."""
    return (folder / CONFIG_FILE).is_file()


def longest_window(folder: Path) -> int | None:
    """The longest text that a model was made for, by its config.json; None where none says so (an ONNX folder)."""
    try:
        config = read_config(folder)
    except UserError:
        return None
    found = (config.get(key) for key in ("max_position_embeddings", "n_positions"))
    return next((int(value) for value in found if isinstance(value, int) and value > 0), None)


def head_dim(config: dict[str, Any]) -> int:
    """Values a head of q and k."""
    explicit = config.get("head_dim")
    return int(explicit) if explicit else int(config["hidden_size"]) // int(config["num_attention_heads"])
