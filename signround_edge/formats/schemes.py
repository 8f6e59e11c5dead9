"""Schemes: which format each tensor of a model gets. `gguf:q4_0`, `onnx:w4g128-asym`, or a comma between both.

The preset rows follow `llama_tensor_get_type` in llama.cpp's llama-quant.cpp: the decoder's matrices take the preset's
type, the output head (or the embedding that is tied to it) takes Q6_K, and an untied embedding the preset's type.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum

from signround_edge.errors import UserError
from signround_edge.formats import get_grid
from signround_edge.formats.grid import Grid


class Role(Enum):
    """What a weight matrix is for; it decides the format."""

    DECODER = "decoder"
    EMBEDDING = "embedding"
    OUTPUT = "output"  # the head, or the embedding tied to it


@dataclass(frozen=True)
class Preset:
    """One row: the format of each role. All are names for `get_grid`."""

    decoder: str
    embedding: str
    output: str

    def format_of(self, role: Role) -> str:
        return {Role.DECODER: self.decoder, Role.EMBEDDING: self.embedding, Role.OUTPUT: self.output}[role]


GGUF_PRESETS = {
    "q4_0": Preset("Q4_0", "Q4_0", "Q6_K"),
    "q4_1": Preset("Q4_1", "Q4_1", "Q6_K"),
    "q5_0": Preset("Q5_0", "Q5_0", "Q6_K"),
    "q5_1": Preset("Q5_1", "Q5_1", "Q6_K"),
    "q8_0": Preset("Q8_0", "Q8_0", "Q8_0"),
}

ONNX_BITS = (4, 8)
ONNX_BLOCKS = (16, 32, 64, 128, 256)
# ONNX embeddings and heads: 8 bits, nearly lossless, and on small models a third of the file when left in floats.
ONNX_OUTPUT = "Q8_0"

# Where a row is no multiple of the block: llama.cpp's rule (`tensor_type_fallback` in llama-quant.cpp). The types of
# 32-value blocks have no fallback there but F16, which is not quantized, so it needs the user's consent.
GGUF_FALLBACK = {"Q6_K": "Q8_0"}


@dataclass(frozen=True)
class Scheme:
    """A parsed scheme.

    Attributes:
        text: as the user wrote it, in lower case.
        targets: exporters that the run can feed without another rounding ("gguf", "onnx").
        preset: the format of each role.
    """

    text: str
    targets: tuple[str, ...]
    preset: Preset

    def grid_for(self, role: Role, cols: int) -> Grid | None:
        """The grid for rows of `cols` values after fallbacks, or None when no block size divides them."""
        name: str | None = self.preset.format_of(role)
        while name is not None and cols % get_grid(name).row_multiple:
            name = fallback(name)
        return None if name is None else get_grid(name)


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
    gguf = [f"gguf:{name}" for name in GGUF_PRESETS]
    onnx = [f"onnx:w{b}g{g}{asym}" for b in ONNX_BITS for g in ONNX_BLOCKS for asym in ("", "-asym")]
    return gguf + onnx


def parse_scheme(text: str) -> Scheme:
    """Parse `gguf:q4_0`, `onnx:w4g32`, or several joined by commas that share a grid; UserError otherwise."""
    names = [name.strip().lower() for name in text.split(",") if name.strip()]
    if not names:
        raise UserError(f"--scheme is empty; known schemes are {', '.join(known_schemes())}")
    schemes = [_parse_one(name) for name in names]
    grids = {get_grid(s.preset.decoder).name for s in schemes}
    if len(grids) > 1:
        raise UserError(
            f"--scheme {text}: these do not share a grid ({' and '.join(sorted(grids))}), so one run cannot feed both; "
            "run quantize once for each"
        )
    # The first GGUF preset decides embeddings and head: its types map onto MatMulNBits, not the other way round.
    first = next((s for s in schemes if s.targets == ("gguf",)), schemes[0])
    targets = tuple(dict.fromkeys(t for s in schemes for t in s.targets))
    return Scheme(",".join(names), targets, first.preset)


def _parse_one(name: str) -> Scheme:
    target, _, rest = name.partition(":")
    if target == "gguf" and rest in GGUF_PRESETS:
        return Scheme(name, ("gguf",), GGUF_PRESETS[rest])
    if target == "onnx" and name in known_schemes():
        return Scheme(name, ("onnx",), Preset(rest, ONNX_OUTPUT, ONNX_OUTPUT))
    raise UserError(f"unknown scheme {name!r}; known schemes are {', '.join(known_schemes())}")
