"""Layouts of the block types with super-blocks of 256 values: Q2_K to Q6_K and IQ4_XS."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporters.gguf.blocks.layout import (
    BIT_PAIRS,
    LOW_BITS,
    LOW_NIBBLES,
    LOW_PAIRS,
    BlockLayout,
    Bytes,
    Codes,
    UnitFields,
    bit_pairs,
    fp16_bytes,
    fp16_values,
    neighbours,
    nibbles,
    side_by_side,
    single_bits,
    words,
)

_PAIRS = BIT_PAIRS.reshape(4, 1)
_NIBBLES, _TOP_PAIRS = np.uint32(0x0F0F0F0F), np.uint32(0x30303030)  # of four 6-bit integers


def _unpack_bit_pairs(data: Bytes) -> Codes:
    """The inverse of `bit_pairs`: [U, 64] as [U, 256]."""
    return ((data.reshape(-1, 2, 1, 32) >> _PAIRS) & 3).reshape(-1, 256)


def _unpack_nibble_runs(data: Bytes) -> Codes:
    """The inverse of `nibbles` with runs of 32: [U, 128] as [U, 256]."""
    runs = data.reshape(-1, 4, 1, 32)
    return np.concatenate([runs & 15, runs >> 4], axis=2).reshape(-1, 256)


def _unpack_high_bits(data: Bytes) -> Codes:
    """The inverse of `single_bits`: [U, 32] as [U, 256]."""
    return np.unpackbits(data[:, None, :], axis=1, bitorder="little").reshape(-1, 256)


class Q2KLayout(BlockLayout):
    """Q2_K: 16 bytes of sub-scale (low) and sub-minimum (high) nibbles, bit pairs, fp16 d and dmin."""

    name = "Q2_K"

    def pack_units(self, codes: Codes, fields: UnitFields) -> Bytes:
        subs = words(fields["sub_scale"]) | (words(fields["sub_minimum"]) << 4)
        supers = [fp16_bytes(fields["super_scale"]), fp16_bytes(fields["super_minimum"])]
        return side_by_side(len(codes), [subs, bit_pairs(codes), *supers])

    def unpack_units(self, units: Bytes) -> tuple[Codes, UnitFields]:
        fields = {
            "sub_scale": units[:, :16] & 15,
            "sub_minimum": units[:, :16] >> 4,
            "super_scale": fp16_values(units[:, 80:82]),
            "super_minimum": fp16_values(units[:, 82:84]),
        }
        return _unpack_bit_pairs(units[:, 16:80]), fields


class Q3KLayout(BlockLayout):
    """Q3_K: 32 bytes of high bits, bit pairs, 12 bytes of 6-bit sub-scales, fp16 d.

    Sub-scale i, offset by 32, has its low nibble in byte
    i % 8 (the first eight are the low nibbles there) and its high pair in pair i // 4 of byte 8 + i % 4.
    """

    name = "Q3_K"

    def pack_units(self, codes: Codes, fields: UnitFields) -> Bytes:
        high, low = (words(codes) >> 2) & LOW_BITS, words(codes) & LOW_PAIRS
        subs = fields["sub_scale"] + np.int8(32)
        tops = ((words(subs) >> 4) & LOW_PAIRS).view("<u4").reshape(-1, 4)
        pairs = tops[:, 0] | (tops[:, 1] << 2) | (tops[:, 2] << 4) | (tops[:, 3] << 6)
        parts = [single_bits(high), bit_pairs(low), nibbles(words(subs) & LOW_NIBBLES, 8), pairs]
        return side_by_side(len(codes), [*parts, fp16_bytes(fields["super_scale"])])

    def unpack_units(self, units: Bytes) -> tuple[Codes, UnitFields]:
        high = _unpack_high_bits(units[:, :32])
        low_bytes, pairs = units[:, 96:104], units[:, 104:108]
        low = np.concatenate([low_bytes & 15, low_bytes >> 4], axis=-1)
        top = ((pairs[:, None, :] >> _PAIRS) & 3).reshape(-1, 16)
        sub_scale = (low | (top << 4)).view(np.int8) - np.int8(32)
        codes = _unpack_bit_pairs(units[:, 32:96]) | (high << 2)
        return codes, {"sub_scale": sub_scale, "super_scale": fp16_values(units[:, 108:110])}


class Q45KLayout(BlockLayout):
    """Q4_K and Q5_K: fp16 d and dmin, 12 bytes of 6-bit sub-scales and sub-minimums, (5 bits) high bits, nibbles.

    `get_scale_min_k4` of ggml-quants.c: the first four sub-scales are the low 6 bits of bytes 0–3, the first four
    sub-minimums those of bytes 4–7; bytes 8–11 hold the low nibbles of the other sub-scales and, above, sub-minimums,
    whose high pairs are the top bits of bytes 0–3 and 4–7.
    """

    def __init__(self, name: str, bits: int) -> None:
        self.name = name
        self.bits = bits

    def pack_units(self, codes: Codes, fields: UnitFields) -> Bytes:
        units = len(codes)
        parts: list[NDArray[Any]] = [fp16_bytes(fields["super_scale"]), fp16_bytes(fields["super_minimum"])]
        scale, minimum = (fields[f"sub_{kind}"].view("<u4") for kind in ("scale", "minimum"))
        parts += [sub[:, 0] | ((sub[:, 1] & _TOP_PAIRS) << 2) for sub in (scale, minimum)]
        parts.append((scale[:, 1] & _NIBBLES) | ((minimum[:, 1] & _NIBBLES) << 4))
        if self.bits == 5:
            parts.append(single_bits((words(codes) >> 4) & LOW_BITS))
            codes = words(codes) & LOW_NIBBLES
        return side_by_side(units, [*parts, nibbles(codes, 32)])

    def unpack_units(self, units: Bytes) -> tuple[Codes, UnitFields]:
        first, low = (units[:, 4:8], units[:, 8:12]), units[:, 12:16]
        lows = (low & 15, low >> 4)
        scale, minimum = (
            np.concatenate([six & 63, nibble | ((six >> 6) << 4)], axis=-1)
            for six, nibble in zip(first, lows, strict=True)
        )
        codes = _unpack_nibble_runs(units[:, -128:])
        if self.bits == 5:
            codes |= _unpack_high_bits(units[:, 16:48]) << 4
        supers = {"super_scale": fp16_values(units[:, :2]), "super_minimum": fp16_values(units[:, 2:4])}
        return codes, {"sub_scale": scale, "sub_minimum": minimum, **supers}


class Q6KLayout(BlockLayout):
    """Q6_K: 128 bytes of low nibbles, 64 of high bit pairs, 16 int8 sub-scales, fp16 d.

    Each half of 128 values is four groups of 32: groups 0 and 2 share the first 32 bytes of nibbles, 1 and 3 the next,
    and all four share 32 bytes of bit pairs.
    """

    name = "Q6_K"

    def pack_units(self, codes: Codes, fields: UnitFields) -> Bytes:
        low, high = words(codes) & LOW_NIBBLES, (words(codes) >> 4) & LOW_PAIRS
        parts = [nibbles(low, 64), bit_pairs(high), fields["sub_scale"], fp16_bytes(fields["super_scale"])]
        return side_by_side(len(codes), parts)

    def unpack_units(self, units: Bytes) -> tuple[Codes, UnitFields]:
        lows = units[:, :128].reshape(-1, 2, 2, 32)
        low = np.concatenate([lows & 15, lows >> 4], axis=2).reshape(-1, 256)
        codes = low | (_unpack_bit_pairs(units[:, 128:192]) << 4)
        sub_scale = np.ascontiguousarray(units[:, 192:208]).view(np.int8)
        return codes, {"sub_scale": sub_scale, "super_scale": fp16_values(units[:, 208:])}


class IQ4XSLayout(BlockLayout):
    """IQ4_XS: fp16 d, a 16-bit word of high pairs and 4 bytes of low nibbles of the sub-scales, nibbles j and j+16.

    Sub-scale i, offset by 32, has its low nibble in nibble i and its high pair in pair i of the word.
    """

    name = "IQ4_XS"

    def pack_units(self, codes: Codes, fields: UnitFields) -> Bytes:
        subs = fields["sub_scale"] + np.int8(32)
        high = neighbours(((words(subs) >> 4) & LOW_PAIRS).view(np.uint8))
        twos = (words(subs) & LOW_NIBBLES).view("<u2")
        low = (twos | (twos >> 4)).astype(np.uint8)
        return side_by_side(len(codes), [fp16_bytes(fields["super_scale"]), high, low, nibbles(codes, 16)])

    def unpack_units(self, units: Bytes) -> tuple[Codes, UnitFields]:
        high = ((units[:, 2:4, None] >> BIT_PAIRS) & 3).reshape(-1, 8)
        low = np.stack([units[:, 4:8] & 15, units[:, 4:8] >> 4], axis=-1).reshape(-1, 8)
        sub_scale = (low | (high << 4)).view(np.int8) - np.int8(32)
        runs = units[:, 8:].reshape(-1, 8, 1, 16)
        codes = np.concatenate([runs & 15, runs >> 4], axis=2).reshape(-1, 256)
        return codes, {"sub_scale": sub_scale, "super_scale": fp16_values(units[:, :2])}
