"""What arguments may be: one place, and the same sentences, for the command line and for programs."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from signround_edge.errors import UserError

HIGHEST_SEED = 2**32 - 1  # torch's generators take 64 bits, of which the numbers of blocks need some


def at_least(flag: str, value: Any, low: int) -> None:
    """UserError unless `value` is a whole number of at least `low`."""
    whole_number(flag, value)
    if value < low:
        raise UserError(f"{flag} {value} must be at least {low}")


def whole_number(flag: str, value: Any) -> None:
    """UserError unless `value` is an int (True and False are none)."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise UserError(f"{flag} {value} must be a whole number")


def check_seed(value: Any) -> None:
    """UserError for what is no seed."""
    whole_number("--seed", value)
    if not 0 <= value <= HIGHEST_SEED:
        raise UserError(f"--seed {value} must be at least 0 and at most {HIGHEST_SEED}")


def bytes_of(flag: str, size: str | int) -> int:
    """500M, 1.5GB or a plain number of bytes: M is 10^6, G is 10^9, and K 10^3; UserError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMG]?)B?", str(size).strip().upper())
    count = 0 if match is None else round(float(match[1]) * {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}[match[2]])
    if count <= 0:
        raise UserError(f"{flag} {size} is not a size; give for example 500M or 4G")
    return count


def of_kind(name: str, value: Any, kind: type | tuple[type, ...], what: str) -> None:
    """UserError unless `value` is of a kind.

    Args:
        what: it must be, for the message: "a TuningSettings, such as …".
    """
    if not isinstance(value, kind):
        raise UserError(f"{name} must be {what}, not a value of type {type(value).__name__}")


def path_of(name: str, value: Any) -> Path:
    """A path that is given as one or as text; UserError for anything else and for an empty text."""
    of_kind(name, value, (str, os.PathLike), "a path")
    if value == "":
        raise UserError(f"{name} is empty; give a path")
    return Path(value)


def read_text(flag: str, path: Path) -> str:
    """The text of a UTF-8 file; UserError that says what is wrong with the file otherwise."""
    if not path.exists():
        raise UserError(f"{flag} {path} does not exist; give a UTF-8 text file")
    if not path.is_file():
        what = "a folder" if path.is_dir() else "no regular file"
        raise UserError(f"{flag} {path} is {what}; give a UTF-8 text file")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        where = f"{error.reason} at byte {error.start}"
        raise UserError(f"{flag} {path} is not UTF-8 text ({where}); convert it first") from error
    except OSError as error:
        raise UserError(f"{flag} {path} cannot be read ({error.strerror or error}); give a UTF-8 text file") from error


def several(name: str, value: Any) -> tuple[str, ...]:
    """Texts; one alone is a list of one. UserError for anything else."""
    found = (value,) if isinstance(value, str) else value
    of_kind(name, found, Sequence, "a text or a list of texts")
    for one in found:
        of_kind(name, one, str, "a text or a list of texts")
    return tuple(found)


def nearest(word: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The known words that are spelt most like one, best first."""
    return sorted(known, key=lambda one: -SequenceMatcher(None, word.lower(), one.lower()).ratio())[:count]
