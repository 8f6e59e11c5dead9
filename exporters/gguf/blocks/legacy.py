"""Layouts of the block types with one scale (and minimum) a block: Q1_0, Q2_0, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, IQ4_NL."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporters.gguf.blocks.layout import (
    BIT_PAIRS,
    LOW_BITS,
    LOW_NIBBLES,
    BlockLayout,
    Bytes,
    Codes,
    UnitFields,
    fp16_bytes,
    fp16_values,
    neighbours,
    nibbles,
    side_by_side,
    words,
)

_FIFTH_BITS = LOW_BITS << np.uint64(4)


class SingleScaleLayout(BlockLayout):
    """Q4_0, Q4_1, Q5_0, Q5_1, IQ4_NL: fp16 fields, then (5 bits) 32 high bits, then nibbles j and j+16 in one byte."""

    def __init__(self, name: str, bits: int, fields: tuple[str, ...]) -> None:
        self.name = name
        self.high_bytes = 4 if bits == 5 else 0
        self.fields = fields

    def pack_units(self, codes: Codes, fields: UnitFields) -> Bytes:
        units = len(codes)
        parts: list[NDArray[Any]] = [fp16_bytes(fields[name]) for name in self.fields]
        if self.high_bytes:
            parts.append(np.packbits((words(codes) & _FIFTH_BITS).view(np.uint8), bitorder="little"))
            codes = words(codes) & LOW_NIBBLES
        return side_by_side(units, [*parts, nibbles(codes, 16)])

    def unpack_units(self, units: Bytes) -> tuple[Codes, UnitFields]:
        fields = {name: fp16_values(units[:, 2 * i : 2 * i + 2]) for i, name in enumerate(self.fields)}
        pairs = units[:, -16:]
        codes = np.concatenate([pairs & 15, pairs >> 4], axis=-1)
        if self.high_bytes:
            high = units[:, -16 - self.high_bytes : -16]
            codes |= np.unpackbits(high, axis=-1, bitorder="little") << 4
        return codes, fields


class Q80Layout(BlockLayout):
    """Q8_0: fp16 d, then 32 signed bytes."""

    name = "Q8_0"

    def pack_units(self, codes: Codes, fields: UnitFields) -> Bytes:
        return side_by_side(len(codes), [fp16_bytes(fields["scale"]), codes])

    def unpack_units(self, units: Bytes) -> tuple[Codes, UnitFields]:
        return np.ascontiguousarray(units[:, 2:]).view(np.int8), {"scale": fp16_values(units[:, :2])}


class Q20Layout(BlockLayout):
    """Q2_0: fp16 d, then 2-bit codes, four neighbours to a byte."""

    name = "Q2_0"

    def pack_units(self, codes: Codes, fields: UnitFields) -> Bytes:
        return side_by_side(len(codes), [fp16_bytes(fields["scale"]), neighbours(codes)])

    def unpack_units(self, units: Bytes) -> tuple[Codes, UnitFields]:
        codes = (units[:, 2:, None] >> BIT_PAIRS) & 3
        return codes.reshape(-1, 64), {"scale": fp16_values(units[:, :2])}


class Q10Layout(BlockLayout):
    """Q1_0: fp16 d, then a bit a code, eight neighbours to a byte."""

    name = "Q1_0"

    def pack_units(self, codes: Codes, fields: UnitFields) -> Bytes:
        return side_by_side(len(codes), [fp16_bytes(fields["scale"]), np.packbits(codes, bitorder="little")])

    def unpack_units(self, units: Bytes) -> tuple[Codes, UnitFields]:
        codes = np.unpackbits(np.ascontiguousarray(units[:, 2:]), axis=-1, bitorder="little")
        return codes, {"scale": fp16_values(units[:, :2])}
