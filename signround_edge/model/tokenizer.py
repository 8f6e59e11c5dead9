"""The tokenizer of a model folder, as transformers loads it, and the token ids that belong to it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from signround_edge.errors import UserError
from signround_edge.model.config import CONFIG_FILE, is_model_folder, read_config

GENERATION_CONFIG_FILE = "generation_config.json"
TEMPLATES_FOLDER = "additional_chat_templates"  # transformers' folder of chat templates with names
_TEMPLATE_FILE = "chat_template.json"


@dataclass(frozen=True)
class EndTokens:
    """Token ids at which transformers' `generate` ends a text.

    Attributes:
        ids: in the order of the file, each once.
        source: the file that says so.
    """

    ids: tuple[int, ...]
    source: str


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder or run/config; UserError when there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        if is_model_folder(folder):
            read_config(folder)  # transformers reads it too; where that is what failed, it is said
        raise UserError(f"{folder} holds no tokenizer that transformers can load; add its tokenizer files") from error


def end_tokens(folder: Path) -> EndTokens:
    """What generation_config.json names as `eos_token_id`, else what config.json does: a number or a list.

    UserError when a file is there and is no JSON object.
    """
    generation = _read_object(folder / GENERATION_CONFIG_FILE)
    config = read_config(folder) if is_model_folder(folder) else {}
    places = (
        (generation, GENERATION_CONFIG_FILE),
        (config, CONFIG_FILE),
        (config.get("text_config") or {}, CONFIG_FILE),
    )
    for content, source in places:
        value = content.get("eos_token_id")
        ids = [index for index in (value if isinstance(value, list) else [value]) if type(index) is int and index >= 0]
        if ids:
            return EndTokens(tuple(dict.fromkeys(ids)), source)
    return EndTokens((), CONFIG_FILE)


def chat_templates(tokenizer: Any, folder: Path) -> dict[str, str]:
    """Name → chat template, the default one as "default": those of transformers' tokenizer, from whatever files.

    A folder may also hold a processor's chat_template.json, which counts where the tokenizer has none.
    """
    found = tokenizer.chat_template
    if found is None:
        found = processor_template(folder)
    return {"default": found} if isinstance(found, str) else dict(found or {})


def processor_template(folder: Path) -> str | None:
    """The template of a processor's chat_template.json; None when there is none."""
    found = _read_object(folder / _TEMPLATE_FILE).get("chat_template")
    return found if isinstance(found, str) else None


def _read_object(file: Path) -> dict[str, Any]:
    """A JSON object, empty when there is no such file."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is not JSON ({error}); repair or remove it") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} is not a JSON object; repair or remove it")
    return content


def added_bos(tokenizer: Any) -> int | None:
    """The BOS token when this tokenizer puts one in front of a text, else None."""
    bos = tokenizer.bos_token_id
    start = tokenizer("a")["input_ids"][:1]
    return int(bos) if bos is not None and start == [bos] else None
