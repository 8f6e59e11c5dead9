"""Layouts of the block types of 4-bit floats with 8-bit floats for scales: MXFP4 and NVFP4.

Codes count the levels of e2m1 in their order, 0 to 14; a nibble is a sign above a magnitude. Nibble 8, minus zero, is
read as zero and written as 0.
"""

from __future__ import annotations

import numpy as np

from exporters.gguf.blocks.layout import BlockLayout, Bytes, Codes, UnitFields, nibbles, side_by_side

_ZERO = 7  # the code of level zero
_NIBBLES = np.array([*range(15, 8, -1), *range(8)], dtype=np.uint8)  # of each code
_CODES = np.array([*range(_ZERO, 15), *range(_ZERO, -1, -1)], dtype=np.uint8)  # of each nibble


class SmallFloatLayout(BlockLayout):
    """Bytes of scales, then nibbles: of each `run` values of a scale the first half are the low ones."""

    def __init__(self, name: str, run: int) -> None:
        self.name = name
        self.run = run

    def pack_units(self, codes: Codes, fields: UnitFields) -> Bytes:
        return side_by_side(len(codes), [fields["scale_code"], nibbles(_NIBBLES[codes], self.run)])

    def unpack_units(self, units: Bytes) -> tuple[Codes, UnitFields]:
        scales = self.unit_values // (2 * self.run)
        runs = units[:, scales:].reshape(len(units), -1, 1, self.run)
        found = np.concatenate([runs & 15, runs >> 4], axis=2).reshape(len(units), -1)
        return _CODES[found], {"scale_code": units[:, :scales]}
