"""Which types a tensor may have: those that its rows allow, that nothing better replaces, and that no pin forbids."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from signround_edge.errors import UserError
from signround_edge.formats import GRIDS, Grid, get_grid
from signround_edge.formats.matmul_nbits import has_matmul_nbits_form
from signround_edge.manifest import TensorEntry
from signround_edge.schemes.gguf_names import gguf_name
from signround_edge.schemes.roles import columns_together
from signround_edge.schemes.scheme import after_fallback, nearest_names

# Types of the same bits as others that err less, wherever rows are multiples of 256.
_LEGACY = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL")
# Zero points are stored with symmetric types, too, so asymmetric ones cost no byte more. Codes of 3 bits lie in
# containers of 4.
_ONNX = tuple(f"w{bits}g{block}-asym" for bits in (2, 4, 8) for block in (32, 64, 128))


@dataclass(frozen=True)
class Wish:
    """One `--pin` or `--at-least`: what matrices whose name a pattern is found in may have.

    Attributes:
        pattern: regular expression, searched in the Hugging Face name and in the GGUF name.
        grid: the type.
        exactly: this one alone; else also types of more bits a weight.
    """

    pattern: re.Pattern[str]
    grid: Grid
    exactly: bool

    @property
    def text(self) -> str:
        """As it was written."""
        return f"{'--pin' if self.exactly else '--at-least'} {self.pattern.pattern}={self.grid.name}"

    def allows(self, kind: str) -> bool:
        """Whether a type is allowed."""
        return kind == self.grid.name if self.exactly else get_grid(kind).bits_per_weight >= self.grid.bits_per_weight


def parse_wish(text: str, exactly: bool, target: str) -> Wish:
    """PATTERN=TYPE; UserError for what is none, or a type that the target lacks."""
    flag = "--pin" if exactly else "--at-least"
    pattern, separator, name = text.rpartition("=")
    if not separator or not pattern or not name:
        raise UserError(f"{flag} {text!r} is not of the form PATTERN=TYPE; for example {flag} attn_v=Q6_K")
    try:
        return Wish(re.compile(pattern), _known(name, target, f"{flag} {text!r}"), exactly)
    except re.error as error:
        raise UserError(f"{flag} {text!r}: {pattern!r} is no regular expression ({error})") from error


def allowed_types(target: str, given: str | None) -> tuple[str, ...]:
    """The types to choose from: those given, or all of the target."""
    if given is not None:
        names = [name.strip() for name in given.split(",") if name.strip()]
        if not names:
            raise UserError("--types names no type; give some, such as Q3_K,Q4_K,Q6_K")
        return tuple(dict.fromkeys(_known(name, target, f"--types {given}").name for name in names))
    return _ONNX if target == "onnx" else tuple(name for name in GRIDS if not name.startswith("w"))


def types_of(
    entry: TensorEntry, target: str, allowed: Sequence[str], wishes: Sequence[Wish], config: Any, chosen: bool
) -> tuple[str, ...]:
    """The types that a matrix may have; () where no block divides its rows.

    Args:
        allowed: as `allowed_types` gave them.
        chosen: they were given by the user: none is left out as inferior.
    """
    cols, together = entry.out_in_shape[-1], columns_together(entry.name, config)
    known = (entry.name, gguf_name(entry.name, config.model_type) or entry.name)
    own = [wish for wish in wishes if any(wish.pattern.search(name) for name in known)]
    pinned = [wish.grid.name for wish in own]
    fitting = [kind for kind in dict.fromkeys((*allowed, *pinned)) if _fits(kind, cols, target, together)]
    if not fitting and chosen:  # what those fall back to
        fallen = (after_fallback(get_grid(kind), cols, (target,), together) for kind in allowed)
        fitting = list(dict.fromkeys(grid.name for grid in fallen if grid is not None))
    if any(kind not in _LEGACY and get_grid(kind).row_multiple == 256 for kind in fitting) and not chosen:
        fitting = [kind for kind in fitting if kind not in _LEGACY or kind in pinned]
    if not fitting and not own:
        return ()
    kept = tuple(kind for kind in fitting if all(wish.allows(kind) for wish in own))
    if not kept:
        texts = " and ".join(wish.text for wish in own)
        if not any(all(wish.allows(kind) for wish in own) for kind in GRIDS):
            raise UserError(f"{texts}: no type is both, and {entry.name} fits both patterns; leave one of them out")
        raise UserError(
            f"{texts}: {entry.name} with its rows of {cols} values can have {', '.join(fitting) or 'no type'}; "
            "give another type for it"
        )
    return kept


def check_wishes(wishes: Sequence[Wish], names: Sequence[str], model_type: str) -> None:
    """UserError for a pattern that fits no matrix."""
    known: list[tuple[str, ...]] = [(name, gguf_name(name, model_type) or name) for name in names]
    for wish in wishes:
        if not any(wish.pattern.search(one) for pair in known for one in pair):
            near = ", ".join(nearest_names(wish.pattern.pattern, known))
            raise UserError(
                f"{wish.text}: no matrix of this model has a name that fits {wish.pattern.pattern!r}; near it are "
                f"{near}"
            )


def _fits(kind: str, cols: int, target: str, together: int | None) -> bool:
    fitting = after_fallback(get_grid(kind), cols, (target,), together)
    return fitting is not None and fitting.name == kind


def _known(name: str, target: str, given: str) -> Grid:
    try:
        grid = get_grid(name)
    except UserError as error:
        raise UserError(f"{given}: {error}") from error
    if target == "onnx" and not has_matmul_nbits_form(grid):
        raise UserError(f"{given}: ONNX's MatMulNBits has no form of {grid.name}; use w4g32-asym or w8g32-asym")
    if target == "gguf" and grid.name.startswith("w"):
        raise UserError(f"{given}: GGUF has no type {grid.name}; it has {', '.join(allowed_types('gguf', None))}")
    return grid
