"""How a model's images are prepared: preprocessor_config.json, or the processor_config.json that holds the same."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from signround_edge.errors import UserError

_FILES = ("preprocessor_config.json", "processor_config.json")  # of both, the second counts, as for the converter


@dataclass(frozen=True)
class Preprocessor:
    """Its entries.

    Attributes:
        mean, std: of each channel, of values from 0 to 1.
        longest_edge: what images are scaled to, where there is such a size.
    """

    mean: list[float]
    std: list[float]
    longest_edge: int | None

    @classmethod
    def read(cls, folder: Path) -> Preprocessor:
        """Read a model folder's; UserError where there is none."""
        entries: dict[str, Any] = {}
        for file in (folder / name for name in _FILES):
            if file.is_file():
                entries |= _read(file)
        mean, std = (_channels(entries.get(name)) for name in ("image_mean", "image_std"))
        if mean is None or std is None:
            raise UserError(
                f"{folder} has no {_FILES[0]} with image_mean and image_std, without which an mmproj file cannot say "
                "how images are prepared; download that file, too"
            )
        size = entries.get("size")
        longest = size.get("longest_edge") if isinstance(size, dict) else None
        return cls(mean, std, longest if isinstance(longest, int) else None)


def _read(file: Path) -> dict[str, Any]:
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}); download it again") from error
    if not isinstance(entries, dict):
        raise UserError(f"{file} is not a JSON object; download it again")
    inner = entries.get("image_processor")
    return {**entries, **inner} if isinstance(inner, dict) else entries


def _channels(value: object) -> list[float] | None:
    """A number for each of three channels; None where it is something else."""
    if not isinstance(value, list) or len(value) != 3 or not all(isinstance(one, int | float) for one in value):
        return None
    return [float(one) for one in value]
