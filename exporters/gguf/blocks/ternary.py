"""Layouts of the ternary block types with one fp16 scale for 256 values: TQ1_0 and TQ2_0."""

from __future__ import annotations

import numpy as np

from exporters.gguf.blocks.layout import (
    BIT_PAIRS,
    BlockLayout,
    Bytes,
    Codes,
    UnitFields,
    bit_pairs,
    fp16_bytes,
    fp16_values,
    side_by_side,
)

# Where TQ1_0's three groups of bytes end, and how many values a byte of each holds, their distance in the unit.
_GROUPS = ((0, 160, 5, 32), (160, 240, 5, 16), (240, 256, 4, 4))  # first value, end, values a byte, distance
_POWERS = np.array([81, 27, 9, 3, 1], dtype=np.uint16)


class TQ10Layout(BlockLayout):
    """TQ1_0: 48 bytes of five values, 4 of four, each a number in base 3 scaled up to the whole byte, then fp16 d.

    The first digit of a number n < 243 is (3·byte) >> 8 with byte = ⌈256·n / 243⌉; multiplying the byte by 3, modulo
    256, brings the next one to the top (`dequantize_row_tq1_0`).
    """

    name = "TQ1_0"

    def pack_units(self, codes: Codes, fields: UnitFields) -> Bytes:
        parts = []
        for first, end, count, distance in _GROUPS:
            digits = codes[:, first:end].reshape(len(codes), count, distance)
            numbers = (digits * _POWERS[:count, None]).sum(axis=1, dtype=np.uint16)
            parts.append(((numbers.astype(np.uint32) * 256 + 242) // 243).astype(np.uint8))
        return side_by_side(len(codes), [*parts, fp16_bytes(fields["scale"])])

    def unpack_units(self, units: Bytes) -> tuple[Codes, UnitFields]:
        codes, start = [], 0
        for _, _, count, distance in _GROUPS:
            shifted = units[:, start : start + distance, None] * (3 ** np.arange(count)).astype(np.uint8)
            digits = ((shifted.astype(np.uint16) * 3) >> 8).astype(np.uint8)
            codes.append(digits.transpose(0, 2, 1).reshape(len(units), -1))
            start += distance
        return np.concatenate(codes, axis=1), {"scale": fp16_values(units[:, 52:])}


class TQ20Layout(BlockLayout):
    """TQ2_0: bit pairs, four values 32 apart to a byte, then fp16 d."""

    name = "TQ2_0"

    def pack_units(self, codes: Codes, fields: UnitFields) -> Bytes:
        return side_by_side(len(codes), [bit_pairs(codes), fp16_bytes(fields["scale"])])

    def unpack_units(self, units: Bytes) -> tuple[Codes, UnitFields]:
        pairs = (units[:, :64].reshape(-1, 2, 1, 32) >> BIT_PAIRS.reshape(4, 1)) & 3
        return pairs.reshape(-1, 256), {"scale": fp16_values(units[:, 64:])}
