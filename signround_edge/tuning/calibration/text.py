"""Calibration samples: a text file, JSON lines or a Hugging Face dataset name becomes tokens [samples, seqlen]."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from signround_edge.arguments import read_text
from signround_edge.errors import UserError

# Keys looked for in JSON lines and dataset rows, in this order.
TEXT_KEYS = ("text", "content", "prompt")
_WAY_OUT = "give a text file, JSON lines or a dataset name"


def calibration_tokens(source: str, tokenizer: Any, samples: int, seqlen: int) -> Tensor:
    """int64 [samples, seqlen] from `source`; fewer samples when the text is short, UserError when it gives none.

    A plain text is tokenized once and cut into windows spread evenly over it. Of JSON lines and datasets, each document
    of at least `seqlen` tokens gives its first `seqlen`; shorter ones are joined end to end and then cut.
    """
    documents = _read(source)
    windows = [] if documents is None else _from_documents(documents, tokenizer, samples, seqlen)
    if documents is None:
        windows = _from_text(Path(source), tokenizer, samples, seqlen)
    if not windows:
        raise UserError(f"--calibration {source} has fewer than {seqlen} tokens; give more text or a smaller --seqlen")
    return torch.tensor(windows, dtype=torch.int64)


def tokens_hash(tokens: Tensor) -> str:
    """sha256 of the samples: part of what decides whether a run may be resumed."""
    return hashlib.sha256(tokens.numpy().tobytes()).hexdigest()


def _read(source: str) -> Iterable[str] | None:
    """Documents of a JSON-lines file or dataset; None for a plain text file."""
    path = Path(source)
    if not path.is_file():
        if path.exists() and not path.is_dir():
            raise UserError(f"--calibration {source} is no regular file; {_WAY_OUT}")
        if not path.is_dir() and (path.suffix or source.startswith((".", "/", "~"))):
            raise UserError(f"--calibration {source} does not exist; {_WAY_OUT}")
        return _dataset(source)
    return _json_lines(path) if path.suffix in (".jsonl", ".ndjson", ".json") else None


def _json_lines(path: Path) -> Iterable[str]:
    for number, line in enumerate(_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path} line {number} is not JSON; give one JSON object a line") from error
        yield row if isinstance(row, str) else _row_text(row, f"{path} line {number}")


def _row_text(row: Any, where: str) -> str:
    if isinstance(row, dict):
        for key in TEXT_KEYS:
            if isinstance(row.get(key), str):
                return str(row[key])
    raise UserError(f"{where} has none of the keys {', '.join(TEXT_KEYS)}; rename the key of the text to 'text'")


def _dataset(name: str) -> Iterable[str]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise UserError(
            f"--calibration {name} is no file here; to read it as a Hugging Face dataset, "
            "`pip install signround-edge[datasets]`"
        ) from error
    try:
        rows = load_dataset(name, split="train", streaming=True)
        yield from (_row_text(row, f"dataset {name}") for row in rows)
    except UserError:
        raise
    except Exception as error:
        what = "it is a folder, and no dataset with a split 'train'" if Path(name).is_dir() else "check the name"
        raise UserError(
            f"--calibration {name} is neither a file nor a dataset that could be read ({type(error).__name__}): "
            f"{what}; {_WAY_OUT}"
        ) from error


def _text(path: Path) -> str:
    return read_text("--calibration", path)


def _from_text(path: Path, tokenizer: Any, samples: int, seqlen: int) -> list[list[int]]:
    tokens = _encode(tokenizer, _text(path))
    count = min(samples, len(tokens) // seqlen)
    spread = (len(tokens) - seqlen) / max(1, count - 1)
    return [tokens[start : start + seqlen] for start in (int(i * spread) for i in range(count))]


def _from_documents(documents: Iterable[str], tokenizer: Any, samples: int, seqlen: int) -> list[list[int]]:
    windows: list[list[int]] = []
    short: list[int] = []
    for document in documents:
        tokens = _encode(tokenizer, document)
        if len(tokens) < seqlen:
            short += tokens
            tokens, short = (short[:seqlen], short[seqlen:]) if len(short) >= seqlen else ([], short)
        if tokens:
            windows.append(tokens[:seqlen])
        if len(windows) == samples:
            break
    return windows


def _encode(tokenizer: Any, text: str) -> list[int]:
    # verbose=False: the tokenizer would warn that the text is longer than the model's context; it is cut below.
    return list(tokenizer(text, verbose=False)["input_ids"])
