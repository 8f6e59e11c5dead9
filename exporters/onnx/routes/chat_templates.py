"""Chat templates as files of their own, which is how transformers 5 writes them.

Both transformers and onnxruntime-genai read `chat_template.jinja`; a list in tokenizer_config.json, as older folders
have it, keeps onnxruntime-genai from loading the tokenizer at all.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from signround_edge.model.tokenizer import TEMPLATES_FOLDER, processor_template

_DEFAULT_FILE = "chat_template.jinja"
_CONFIG_FILE = "tokenizer_config.json"


def lay_out_chat_templates(folder: Path, config_dir: Path, log: Callable[[str], None]) -> None:
    """Put every chat template of an export's `folder` in its file, and say what onnxruntime-genai does not read.

    Args:
        folder: with the tokenizer's files, edited in place.
        config_dir: the run's config folder, for a processor's template where the tokenizer has none.
    """
    default, others = folder / _DEFAULT_FILE, folder / TEMPLATES_FOLDER
    inline = _take_list(folder / _CONFIG_FILE)
    if not default.is_file() and not any(
        others.glob("*.jinja")
    ):  # transformers reads the list only where there is none
        for name, text in inline.items():
            file = default if name == "default" else others / f"{name}.jinja"
            if name != Path(name).name:
                log(f"chat template {name!r} was left out: its name is no file name; rename it in {_CONFIG_FILE}")
                continue
            file.parent.mkdir(exist_ok=True)
            file.write_text(text, encoding="utf-8")
        processors = processor_template(config_dir)
        if processors is not None and not inline and "chat_template" not in _read(folder / _CONFIG_FILE):
            default.write_text(processors, encoding="utf-8")
    names = sorted(file.stem for file in others.glob("*.jinja"))
    if names and default.is_file():
        log(
            f"onnxruntime-genai uses the default chat template only; give it the others ({', '.join(names)}, in "
            f"{TEMPLATES_FOLDER}) as template_str of apply_chat_template"
        )
    elif names:
        log(
            f"the model's chat templates ({', '.join(names)}) have no default one, and onnxruntime-genai uses no "
            "other; give it one as template_str of apply_chat_template"
        )


def _take_list(file: Path) -> dict[str, str]:
    """Name → template of a list in tokenizer_config.json, which is taken out of it."""
    config = _read(file)
    listed = config.get("chat_template")
    if not isinstance(listed, list):
        return {}
    del config["chat_template"]
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return {entry["name"]: entry["template"] for entry in listed}


def _read(file: Path) -> dict[str, Any]:
    """tokenizer_config.json; empty where it is missing, or cannot be read: it is copied, and nobody need read it."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}
