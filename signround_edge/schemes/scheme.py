"""Schemes: which format each tensor of a model gets. `gguf:q4_k_m`, `onnx:w4g128-asym`, or a comma between both."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

from signround_edge.arguments import nearest
from signround_edge.errors import UserError
from signround_edge.formats import ALIASES, GRIDS, get_grid
from signround_edge.formats.grid import Grid
from signround_edge.formats.matmul_nbits import ONNX_BITS, ONNX_BLOCKS, has_matmul_nbits_form
from signround_edge.schemes.gguf_presets import GGUF_FALLBACK, GGUF_PRESETS, ModelTraits, Place, Preset, Role
from signround_edge.schemes.planned_types import PlannedTypes

_WHERE_ALL_ARE = "docs/formats.md lists all, such as gguf:q4_k_m and onnx:w4g128-asym"

# ONNX embeddings and heads: 8 bits, nearly lossless, and on small models a third of the file when left in floats.
ONNX_OUTPUT = "Q8_0"

# What llama-quantize takes for a type, and no grid is.
_FLOATS = ("f16", "bf16", "f32", "fp16", "fp32", "float16", "float32", "bfloat16")

# What llama-quantize understands by the short names.
PRESET_ALIASES = {"q3_k": "q3_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m"}


@dataclass(frozen=True)
class TensorType:
    """One `--tensor-type PATTERN=TYPE`: matrices whose name the pattern is found in get this type.

    Attributes:
        pattern: regular expression, searched in the Hugging Face name and in the GGUF name.
        grid: the type.
    """

    pattern: re.Pattern[str]
    grid: Grid

    @property
    def text(self) -> str:
        """As it was written."""
        return f"{self.pattern.pattern}={self.grid.name}"


@dataclass(frozen=True)
class Scheme:
    """A parsed scheme.

    Attributes:
        text: as the user wrote it, in lower case.
        targets: exporters that the run can feed without another rounding ("gguf", "onnx").
        preset: the format of each role.
        overrides: types by name; the first that matches counts.
        embedding, head: the type asked for the token embedding and the output head; None leaves them to the preset.
        planned: types by exact name, which nothing else has a say in; None but for plans.
    """

    text: str
    targets: tuple[str, ...]
    preset: Preset
    overrides: tuple[TensorType, ...] = ()
    embedding: Grid | None = None
    head: Grid | None = None
    planned: PlannedTypes | None = None

    @property
    def override_texts(self) -> list[str]:
        """Every type that the user gave, as the manifest keeps them."""
        given = {"token_embedding": self.embedding, "output_tensor": self.head}
        named = [f"{name}={grid.name}" for name, grid in given.items() if grid is not None]
        return [o.text for o in self.overrides] + named

    def asked_for(self, names: tuple[str, ...], place: Place, model: ModelTraits, cols: int) -> Grid:
        """The grid of a matrix before any fallback.

        Args:
            names: the names by which the user may know the matrix.
            cols: values a row.
        """
        for override in self.overrides:
            if any(override.pattern.search(name) for name in names):
                return override.grid
        asked = {Role.EMBEDDING: self.embedding, Role.OUTPUT: self.head}.get(place.role)
        return asked or get_grid(self.preset.format_of(place, model, cols))

    def check_overrides(self, names: list[tuple[str, ...]]) -> None:
        """UserError for a type by name that fits no matrix of the model.

        Args:
            names: of each matrix, those by which the user may know it.
        """
        for override in self.overrides:
            if not any(override.pattern.search(name) for known in names for name in known):
                near = ", ".join(nearest_names(override.pattern.pattern, names))
                raise UserError(
                    f"--tensor-type {override.text}: no matrix of this model has a name that fits "
                    f"{override.pattern.pattern!r}; near it are {near}"
                )

    def with_overrides(self, texts: tuple[str, ...]) -> Scheme:
        """The scheme with `--tensor-type` arguments; UserError for one that cannot be read or exported."""
        return replace(self, overrides=tuple(_parse_override(text, self.targets) for text in texts))

    def with_outside_types(self, embedding: str | None, head: str | None) -> Scheme:
        """The scheme with `--token-embedding-type` and `--output-tensor-type`; UserError for an unknown type."""
        grids = [
            None if name is None else _grid_for(name, f"{flag} {name}", self.targets)
            for flag, name in (("--token-embedding-type", embedding), ("--output-tensor-type", head))
        ]
        return replace(self, embedding=grids[0], head=grids[1])

    def for_tied_embedding(self) -> Scheme:
        """The scheme of a model whose head is its embedding; UserError where two types are asked for it."""
        if self.embedding and self.head and self.embedding.name != self.head.name:
            raise UserError(
                f"--token-embedding-type {self.embedding.name} and --output-tensor-type {self.head.name} differ, but "
                "this model's output head is its embedding; give one of them"
            )
        return replace(self, head=self.head or self.embedding)


def after_fallback(
    grid: Grid, cols: int, targets: tuple[str, ...] = ("gguf",), together: int | None = None
) -> Grid | None:
    """The grid for rows of `cols` values: this one or what it falls back to; None when no block size divides them.

    Args:
        together: how many values stay together where GGUF has a matrix's columns in another order; blocks stay whole.
    """
    whole = cols if together is None or "gguf" not in targets else math.gcd(cols, together)
    name: str | None = grid.name
    while name is not None and whole % get_grid(name).row_multiple:
        name = fallback(_AS_MATMUL_NBITS.get(name, name) if targets == ("onnx",) else name)
    return None if name is None else get_grid(name)


# Where ONNX alone is asked for, these fall back as its other formats do.
_AS_MATMUL_NBITS = {get_grid(alias).name: alias for alias in ALIASES}


def fallback(name: str) -> str | None:
    """The next format to try when a row is not a multiple of this one's block; None at the end of the line.

    llama.cpp's rule for its types. For MatMulNBits blocks: half the block size, down to 16.
    """
    match = re.fullmatch(r"(w\d)g(\d+)(-asym)?", name)
    if match is None:
        return GGUF_FALLBACK.get(name)
    half = int(match[2]) // 2
    return f"{match[1]}g{half}{match[3] or ''}" if half >= ONNX_BLOCKS[0] else None


def known_schemes() -> list[str]:
    """Every scheme that `parse_scheme` accepts alone."""
    gguf = [f"gguf:{name}" for name in [*GGUF_PRESETS, *PRESET_ALIASES]]
    blocks = ["", *(f"g{g}" for g in ONNX_BLOCKS)]  # without a block size: per channel, one scale a row
    onnx = [f"onnx:w{b}{g}{asym}" for b in ONNX_BITS for g in blocks for asym in ("", "-asym")]
    return gguf + onnx


def parse_scheme(text: str) -> Scheme:
    """Parse `gguf:q4_0`, `onnx:w4g32`, or several joined by commas that share a grid; UserError otherwise."""
    names = [name.strip().lower() for name in text.split(",")]
    if not all(names):
        meant = ",".join(filter(None, names))
        raise UserError(
            f"--scheme {text!r} has an empty part; give {meant}" if meant else f"--scheme is empty; {_WHERE_ALL_ARE}"
        )
    schemes = [_parse_one(name) for name in names]
    grids = {s.preset.base if "*" in s.preset.base else get_grid(s.preset.base).name for s in schemes}
    mixed = next((s.text for s in schemes if (s.preset.rules or s.preset.experts) and len(schemes) > 1), None)
    if mixed is not None:
        raise UserError(f"--scheme {text}: {mixed} mixes several grids, so no other format can share its run")
    if len(grids) > 1:
        raise UserError(
            f"--scheme {text}: these do not share a grid ({' and '.join(sorted(grids))}), so one run cannot feed both; "
            "run quantize once for each"
        )
    # The first GGUF preset decides embeddings and head: its types map onto MatMulNBits, not the other way round.
    first = next((s for s in schemes if s.targets == ("gguf",)), schemes[0])
    targets = tuple(dict.fromkeys(t for s in schemes for t in s.targets))
    return Scheme(",".join(names), targets, first.preset)


def planned_scheme(planned: PlannedTypes) -> Scheme:
    """The scheme of a plan."""
    return Scheme(planned.scheme, (planned.target,), Preset("Q8_0", output="Q8_0"), planned=planned)


def _parse_one(name: str) -> Scheme:
    target, _, rest = name.partition(":")
    if target == "gguf" and name in known_schemes():
        return Scheme(name, ("gguf",), GGUF_PRESETS[PRESET_ALIASES.get(rest, rest)])
    if target == "onnx" and name in known_schemes():
        bits, asym = rest.removesuffix("-asym"), "-asym" if rest.endswith("-asym") else ""
        base = rest if "g" in bits else f"{bits}g*{asym}"
        return Scheme(name, ("onnx",), Preset(base, embedding=ONNX_OUTPUT, output=ONNX_OUTPUT))
    if target == "onnx":
        raise UserError(f"unknown scheme {name!r}; {_what_onnx_has(rest)}")
    near = ", ".join(nearest(name, known_schemes()))
    raise UserError(f"unknown scheme {name!r}; near it are {near}, and {_WHERE_ALL_ARE}")


def _what_onnx_has(rest: str) -> str:
    """What of an unknown ONNX scheme there is not, and what there is."""
    bits, blocks = (", ".join(map(str, sizes)) for sizes in (ONNX_BITS, ONNX_BLOCKS))
    match = re.fullmatch(r"w(\d+)(?:g(\d+))?(-asym)?", rest)
    if match is not None and int(match[1]) not in ONNX_BITS:
        return f"ONNX Runtime's MatMulNBits has no codes of {match[1]} bits; give {bits} bits, such as onnx:w4g32"
    if match is not None:
        return (
            f"ONNX Runtime's MatMulNBits has no blocks of {match[2]} values; give {blocks}, such as onnx:w{match[1]}g32"
        )
    return f"write onnx:w<bits>g<block size>[-asym] with {bits} bits and blocks of {blocks}, or onnx:w<bits>"


def nearest_names(pattern: str, names: list[tuple[str, ...]]) -> list[str]:
    """The parts of names ("ffn_down", "down_proj") that are spelt most like a pattern, at most three."""
    parts = {part for known in names for name in known for part in name.split(".")[:-1] if not part.isdigit()}
    return nearest(pattern, parts)


def _parse_override(text: str, targets: tuple[str, ...]) -> TensorType:
    pattern, separator, name = text.rpartition("=")
    if not separator or not pattern or not name:
        raise UserError(f"--tensor-type {text!r} is not of the form PATTERN=TYPE; for example ffn_down=Q6_K")
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UserError(f"--tensor-type {text!r}: {pattern!r} is no regular expression ({error})") from error
    return TensorType(compiled, _grid_for(name, f"--tensor-type {text!r}", targets))


def _grid_for(name: str, given: str, targets: tuple[str, ...]) -> Grid:
    """A type by name; UserError, starting with what was given, where one of the targets has no such type."""
    if name.lower() in _FLOATS:
        eight = "Q8_0" if "gguf" in targets else "w8g32"
        raise UserError(
            f"{given}: {name} holds floats, and a type here is one of integers; take {eight} (8 bits, nearly "
            "lossless), or write all matrices as floats with `export --dtype f16`"
        )
    try:
        grid = get_grid(name)
    except UserError as error:
        raise UserError(f"{given}: {error}") from error
    if "onnx" in targets and not has_matmul_nbits_form(grid):
        raise UserError(f"{given}: ONNX's MatMulNBits has no form of {grid.name}; use w4g32 or w8g32")
    if "gguf" in targets and grid.name.startswith("w"):
        known = ", ".join(known for known in GRIDS if not known.startswith("w"))
        raise UserError(f"{given}: GGUF has no type {grid.name}; it has {known}")
    return grid
