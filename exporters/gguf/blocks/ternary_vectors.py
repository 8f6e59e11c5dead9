"""Layouts of IQ1_S and IQ1_M, whose vectors of −1, 0 and 1 are numbers of 11 bits, and levels are shifted by an eighth.

`dequantize_row_iq1_s` and `dequantize_row_iq1_m` in ggml-quants.c.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporters.gguf.blocks.layout import BlockLayout, Bytes, Codes, UnitFields, fp16_bytes, fp16_values, side_by_side
from exporters.gguf.blocks.vectors import entries_of, in_pieces, numbers_of

_THREES = np.arange(0, 12, 3, dtype=np.uint16)  # where four numbers of three bits begin in a word
_NIBBLES = np.array([0, 4], dtype=np.uint8)


def _threes(words: NDArray[Any]) -> Bytes:
    """The first four numbers of three bits of words [U, n]: [U, 4n]."""
    return ((words[..., None] >> _THREES) & 7).astype(np.uint8).reshape(len(words), -1)


def _in_threes(values: Bytes) -> NDArray[np.uint16]:
    """The inverse of `_threes`."""
    found: NDArray[np.uint16] = np.bitwise_or.reduce(
        values.reshape(len(values), -1, 4).astype(np.uint16) << _THREES, axis=-1
    )
    return found


class IQ1SLayout(BlockLayout):
    """IQ1_S: d, low bytes of numbers, then for each 32 values a word: four high parts, sub-scale, sign of the shift."""

    name = "IQ1_S"

    def pack_units(self, codes: Codes, fields: UnitFields) -> Bytes:
        return in_pieces(self._pack, codes, fields, self.unit_bytes)

    def _pack(self, codes: Codes, fields: UnitFields) -> Bytes:
        numbers = numbers_of(self.name, codes)
        words = _in_threes((numbers >> 8).astype(np.uint8))
        words |= (fields["sub_scale"].astype(np.uint16) << 12) | (fields["sub_shift"].astype(np.uint16) << 15)
        return side_by_side(len(codes), [fp16_bytes(fields["super_scale"]), numbers.astype(np.uint8), words])

    def unpack_units(self, units: Bytes) -> tuple[Codes, UnitFields]:
        words = np.ascontiguousarray(units[:, 34:]).view("<u2")
        numbers = units[:, 2:34] | (_threes(words).astype(np.uint16) << 8)
        fields: UnitFields = {
            "sub_scale": ((words >> 12) & 7).astype(np.uint8),
            "sub_shift": (words >> 15).astype(np.uint8),
            "super_scale": fp16_values(units[:, :2]),
        }
        return entries_of(self.name, numbers), fields


class IQ1MLayout(BlockLayout):
    """IQ1_M: low bytes of numbers, then a nibble for each of high part and sign of the shift, then for each 64 values a
    word of four sub-scales and, above them, a quarter of d."""

    name = "IQ1_M"

    def pack_units(self, codes: Codes, fields: UnitFields) -> Bytes:
        return in_pieces(self._pack, codes, fields, self.unit_bytes)

    def _pack(self, codes: Codes, fields: UnitFields) -> Bytes:
        numbers = numbers_of(self.name, codes)
        high = (numbers >> 8).astype(np.uint8) | (fields["sub_shift"] << 3)
        words = _in_threes(fields["sub_scale"])
        scale = fp16_bytes(fields["super_scale"]).view("<u2")
        words |= ((scale >> np.arange(0, 16, 4, dtype=np.uint16)) & 15) << 12
        return side_by_side(len(codes), [numbers.astype(np.uint8), high[:, ::2] | (high[:, 1::2] << 4), words])

    def unpack_units(self, units: Bytes) -> tuple[Codes, UnitFields]:
        high = ((units[:, 32:48, None] >> _NIBBLES) & 15).reshape(len(units), -1)
        words = np.ascontiguousarray(units[:, 48:]).view("<u2")
        scale = np.bitwise_or.reduce((words >> 12) << np.arange(0, 16, 4, dtype=np.uint16), axis=-1)
        fields: UnitFields = {
            "sub_scale": _threes(words),
            "sub_shift": high >> 3,
            "super_scale": fp16_values(scale.astype("<u2").view(np.uint8).reshape(-1, 2)),
        }
        return entries_of(self.name, units[:, :32] | ((high & 7).astype(np.uint16) << 8)), fields
