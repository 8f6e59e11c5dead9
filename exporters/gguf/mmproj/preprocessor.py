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
        mean, std = entries.get("image_mean"), entries.get("image_std")
        if not _is_channels(mean) or not _is_channels(std):
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


def _is_channels(value: object) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(isinstance(one, int | float) for one in value)
