"""The tokenizer of a model folder, as transformers loads it, and the token ids that belong to it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from signround_edge.errors import UserError, first_line
from signround_edge.model.config import CONFIG_FILE, is_model_folder, read_config, refuse_own_code

GENERATION_CONFIG_FILE = "generation_config.json"
TEMPLATES_FOLDER = "additional_chat_templates"  # transformers' folder of chat templates with names
_SETTINGS_FILE = "tokenizer_config.json"
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
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise what they like
        if is_model_folder(folder):
            read_config(folder)  # transformers reads it too; where that is what failed, it is said
        _refuse_broken_files(folder)
        refuse_own_code(folder, error, _SETTINGS_FILE)
        if (folder / "tokenizer.json").is_file():
            raise UserError(
                f"{folder / 'tokenizer.json'}: transformers cannot load this tokenizer ({first_line(error)[:200]}); "
                "download the tokenizer's files again"
            ) from error
        raise UserError(f"{folder} holds no tokenizer that transformers can load; add its tokenizer files") from error


def _refuse_broken_files(folder: Path) -> None:
    """UserError that names the tokenizer file that cannot be read, if there is one."""
    for name in (_SETTINGS_FILE, "tokenizer.json", "special_tokens_map.json", "added_tokens.json", _TEMPLATE_FILE):
        content = _read_object(folder / name)
        templates = content.get("chat_template") if name == _SETTINGS_FILE else None
        for entry in templates if isinstance(templates, list) else []:
            if not isinstance(entry, dict) or not {"name", "template"} <= set(entry):
                raise UserError(
                    f"{folder / name}: its chat_template has an entry without name or template; repair or remove it"
                )
    for file in (folder / "chat_template.jinja", *sorted((folder / TEMPLATES_FOLDER).glob("*.jinja"))):
        if file.is_file():
            _read_template(file)


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


def _read_template(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is not UTF-8 text ({error}); repair or remove it") from error


def check_tokens(largest: int, model: Any) -> None:
    """UserError when the tokenizer gives a token id that a transformers model has no embedding of."""
    known = model.get_input_embeddings().weight.shape[0]
    if largest >= known:
        raise UserError(
            f"the tokenizer gives token {largest}, but the model knows {known}; tokenizer files and weights are not of "
            "the same model"
        )


def added_bos(tokenizer: Any) -> int | None:
    """The BOS token when this tokenizer puts one in front of a text, else None."""
    bos = tokenizer.bos_token_id
    start = tokenizer("a")["input_ids"][:1]
    return int(bos) if bos is not None and start == [bos] else None
