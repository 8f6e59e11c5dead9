"""Calibration documents: rows of JSON lines or of a Hugging Face dataset as texts, chats through the chat template."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from signround_edge.arguments import read_text
from signround_edge.errors import UserError

# Keys looked for in JSON lines and dataset rows, in this order.
TEXT_KEYS = ("text", "content", "prompt")
_JSON = (".jsonl", ".jsonlines", ".ndjson", ".json")
_KINDS = {list: "an array", bool: "true or false", int: "a number", float: "a number"}
_WAY_OUT = "give a text file, JSON lines or a dataset name"


def read_documents(source: str, tokenizer: Any) -> Iterable[str] | None:
    """Documents of a JSON-lines file or dataset; None for a plain text file.

    A row is its text, its `prompt` and `completion` joined, or its `messages` (as a prompt or a completion may be, too)
    as the tokenizer's chat template writes them.

    Raises:
        UserError: no such file or dataset, or (once it is reached) a row that gives no text.
    """
    path = Path(source)
    if not path.is_file():
        if path.exists() and not path.is_dir():
            raise UserError(f"--calibration {source} is no regular file; {_WAY_OUT}")
        if not path.is_dir() and (path.suffix or source.startswith((".", "/", "~"))):
            raise UserError(f"--calibration {source} does not exist; {_WAY_OUT}")
        return _dataset(source, tokenizer)
    return _json_rows(path, tokenizer) if path.suffix.lower() in _JSON else None


def calibration_text(path: Path) -> str:
    """A UTF-8 file without its byte-order mark; UserError when it is not UTF-8."""
    return read_text("--calibration", path).removeprefix("\ufeff")


def _json_rows(path: Path, tokenizer: Any) -> Iterable[str]:
    for where, row in _rows(path):
        text = row if isinstance(row, str) else _row_text(row, where, tokenizer)
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise UserError(f"{where} holds half of a surrogate pair (\\ud800 to \\udfff), which is no text; repair it")
        yield text


def _rows(path: Path) -> Iterable[tuple[str, Any]]:
    """(where, row) of JSON lines, or of a file that is one JSON array of rows."""
    content = calibration_text(path)
    if content.lstrip().startswith("["):
        try:
            rows = json.loads(content)
        except ValueError:  # one array a line, of which the first will be said to be no row
            rows = None
        if isinstance(rows, list):
            yield from ((f"{path} row {number}", row) for number, row in enumerate(rows, 1))
            return
    # Not splitlines(): it also cuts at U+2028 and others, which JSON strings may hold.
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            yield where, json.loads(line)
        except ValueError as error:
            raise UserError(f"{where} is not JSON; give one JSON object a line") from error


def _dataset(name: str, tokenizer: Any) -> Iterable[str]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise UserError(
            f"--calibration {name} is no file here; to read it as a Hugging Face dataset, "
            "`pip install signround-edge[datasets]`"
        ) from error
    try:
        rows = load_dataset(name, split="train", streaming=True)
        yield from (_row_text(row, f"dataset {name}", tokenizer) for row in rows)
    except UserError:
        raise
    except Exception as error:
        what = "it is a folder, and no dataset with a split 'train'" if Path(name).is_dir() else "check the name"
        raise UserError(
            f"--calibration {name} is neither a file nor a dataset that could be read ({type(error).__name__}): "
            f"{what}; {_WAY_OUT}"
        ) from error


def _row_text(row: Any, where: str, tokenizer: Any) -> str:
    if not isinstance(row, dict):
        raise UserError(f"{where} is {_KINDS.get(type(row), 'null')}; give an object or a text")
    if isinstance(row.get("messages"), list):
        return _chat(row["messages"], where, tokenizer)
    prompt, completion = row.get("prompt"), row.get("completion")
    if any(isinstance(part, list) for part in (prompt, completion)) and not _has_text(row):
        return _chat([*_messages(prompt, "user"), *_messages(completion, "assistant")], where, tokenizer)
    for key in TEXT_KEYS:
        if isinstance(row.get(key), str):
            return str(row[key]) + (completion if key == "prompt" and isinstance(completion, str) else "")
    raise UserError(
        f"{where} has none of the keys messages, {', '.join(TEXT_KEYS)}; rename the key of the text to 'text'"
    )


def _has_text(row: dict[str, Any]) -> bool:
    return any(isinstance(row.get(key), str) for key in TEXT_KEYS if key != "prompt")


def _messages(part: Any, role: str) -> list[Any]:
    """A prompt or a completion as messages; a text is one of `role`."""
    if isinstance(part, str):
        return [{"role": role, "content": part}]
    return part if isinstance(part, list) else []


def _chat(messages: list[Any], where: str, tokenizer: Any) -> str:
    """Messages as the chat template writes them, special tokens included."""
    if not tokenizer.chat_template:
        raise UserError(
            f"{where} holds chat messages, but the model's tokenizer has no chat template; add chat_template.jinja to "
            "the model folder, or give texts"
        )
    plain = [_plain(message, where) for message in messages]
    try:
        return str(tokenizer.apply_chat_template(plain, tokenize=False))
    except Exception as error:  # a template is a program of the model's, and raises what it likes
        raise UserError(
            f"{where}: the model's chat template refuses these messages ({error}); mend or remove them"
        ) from error


def _plain(message: Any, where: str) -> dict[str, Any]:
    """A message whose content is one string, or None where it has none (a tool call).

    Parts of text are joined by newlines, as llama.cpp and vLLM do for templates that know strings only.
    """
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise UserError(f"{where} has a message without a role; give each one a 'role' and a 'content'")
    content = message.get("content")
    if isinstance(content, list):
        content = "\n".join(_part(part, where) for part in content)
    if content is not None and not isinstance(content, str):
        raise UserError(f"{where} has a message whose content is no text; give a string, or a list of parts")
    return {**message, "content": content}


def _part(part: Any, where: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(part, dict) and kind in ("text", None) and isinstance(part.get("text"), str):
        return str(part["text"])
    raise UserError(
        f"{where} has a message with a part of type {kind!r}; calibration reads text only, not yet images or sound: "
        "leave that part or that row out"
    )
