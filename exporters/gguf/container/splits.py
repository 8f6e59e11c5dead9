"""The files of a model that is split into several: metadata keys and names, as llama.cpp's gguf-split has them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

SPLIT_NO, SPLIT_COUNT, SPLIT_TENSORS = "split.no", "split.count", "split.tensors.count"
_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


class Part(NamedTuple):
    """What the name of one of several files says.

    Attributes:
        model: the name that the whole model would have.
        number: which file it is, from 1.
        total: of how many.
    """

    model: Path
    number: int
    total: int


def split_path(model: Path, index: int, count: int) -> Path:
    """The name that llama.cpp wants for file `index` (from 0) of `count` of a model."""
    return model.with_name(f"{model.name.removesuffix('.gguf')}-{index + 1:05d}-of-{count:05d}.gguf")


def part_of(path: Path) -> Part | None:
    """What the name of a file says; None when it is not named as one of several."""
    match = _NAME.fullmatch(path.name)
    if match is None or not 1 <= int(match[2]) <= int(match[3]):
        return None
    return Part(path.with_name(f"{match[1]}.gguf"), int(match[2]), int(match[3]))


def model_files(path: Path) -> list[Path]:
    """All files of the model that `path` is one of, by their names: whether they exist is not looked at."""
    part = part_of(path)
    return [path] if part is None else [split_path(part.model, index, part.total) for index in range(part.total)]
