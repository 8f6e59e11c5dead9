"""config.json of a Hugging Face model folder, read and written here and nowhere else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from signround_edge.errors import UserError
from signround_edge.model.transformers_quiet import transformers_quiet

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


def own_code(folder: Path, file: str = CONFIG_FILE) -> list[str]:
    """Modules of Python that a folder brings for its config and model, or its tokenizer, by `auto_map` of a file."""
    try:
        content = json.loads((folder / file).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    named = content.get("auto_map") if isinstance(content, dict) else None
    every = named.values() if isinstance(named, dict) else []
    classes = [name for entry in every for name in (entry if isinstance(entry, list) else [entry])]
    return sorted({f"{name.rpartition('.')[0]}.py" for name in classes if isinstance(name, str)})


def refuse_own_code(folder: Path, error: Exception, file: str = CONFIG_FILE) -> None:
    """UserError where transformers asked for code that a folder brings, and raised `error`; else nothing."""
    if "custom code" in str(error):
        import transformers

        code = ", ".join(own_code(folder, file)) or "auto_map"
        raise UserError(
            f"{folder / file}: the checkpoint brings code of its own ({code}), which is never run, and transformers "
            f"{transformers.__version__} cannot load it otherwise; use a version of transformers that knows it, or a "
            "conversion of the checkpoint to an architecture that it knows"
        ) from error


# What configs of transformers call the longest text that the model was made for.
_POSITIONS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "n_ctx",
    "seq_length",
    "max_sequence_length",
    "max_seq_length",
    "context_length",
    "seq_len",
)


def longest_window(folder: Path) -> int | None:
    """The longest text that a model was made for, by transformers' config; None where none says so (an ONNX folder)."""
    try:
        config = read_config(folder)
    except UserError:
        return None
    found = (_known_config(folder, config).get(key) for key in _POSITIONS)
    return next((int(value) for value in found if type(value) is int and value > 0), None)


def _known_config(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The settings of the language model, with transformers' defaults; as they stand where it does not know them."""
    from transformers import AutoConfig

    try:
        with transformers_quiet():
            known: Any = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        text = known.get_text_config()
    except Exception:  # said by whoever builds the model; an artifact's folder needs none
        return config
    return {key: getattr(text, key, None) for key in _POSITIONS}


def head_dim(config: dict[str, Any]) -> int:
    """Values a head of q and k."""
    explicit = config.get("head_dim")
    return int(explicit) if explicit else int(config["hidden_size"]) // int(config["num_attention_heads"])
