"""The tokenizer of a model folder, as transformers loads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from signround_edge.errors import UserError
from signround_edge.model.config import is_model_folder, read_config


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder or run/config; UserError when there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        if is_model_folder(folder):
            read_config(folder)  # transformers reads it too; where that is what failed, it is said
        raise UserError(f"{folder} holds no tokenizer that transformers can load; add its tokenizer files") from error


def added_bos(tokenizer: Any) -> int | None:
    """The BOS token when this tokenizer puts one in front of a text, else None."""
    bos = tokenizer.bos_token_id
    start = tokenizer("a")["input_ids"][:1]
    return int(bos) if bos is not None and start == [bos] else None
