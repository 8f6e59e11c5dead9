"""Layouts of the block types with super-blocks of 256 values: Q2_K to Q6_K and IQ4_XS."""

from __future__ import annotations

from collections.abc import Sequence
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
    Words,
    bit_pairs,
    fp16_bytes,
    fp16_values,
    neighbours,
    runs,
    side_by_side,
    words,
)

_PAIRS = BIT_PAIRS.reshape(4, 1)
_NIBBLES, _TOP_PAIRS = np.uint32(0x0F0F0F0F), np.uint32(0x30303030)  # of four 6-bit integers


def _groups(codes: Codes) -> list[Words]:
    """The eight groups of 32 values of every unit: ggml's blocks put values of different groups into one byte."""
    return runs(codes, 32, 8)


def _unpack_bit_pairs(data: Bytes) -> Codes:
    """2-bit codes [U, 256] of [U, 64] bytes: each half of 128 is four groups of 32 that share 32 bytes."""
    return ((data.reshape(-1, 2, 1, 32) >> _PAIRS) & 3).reshape(-1, 256)


def _unpack_nibble_runs(data: Bytes) -> Codes:
    """4-bit codes [U, 256] of [U, 128] bytes: of each 64 values, the first 32 are low nibbles, the others high."""
    runs = data.reshape(-1, 4, 1, 32)
    return np.concatenate([runs & 15, runs >> 4], axis=2).reshape(-1, 256)


def _high_bits(groups: Sequence[Words], bit: int) -> Words:
    """One bit of every code, 32 bytes a unit: bit g of byte l belongs to value l of group g of 32."""
    found = (groups[0] >> bit) & LOW_BITS
    for number, group in enumerate(groups[1:], start=1):
        found |= ((group >> bit) & LOW_BITS) << number
    return found


def _nibbles(low: Words, high: Words) -> Words:
    """The low four bits of two codes in a byte."""
    found = high & LOW_NIBBLES
    found <<= 4
    found |= low & LOW_NIBBLES
    return found


def _unpack_high_bits(data: Bytes) -> Codes:
    """The inverse of `_high_bits`."""
    return np.unpackbits(data[:, None, :], axis=1, bitorder="little").reshape(-1, 256)


class Q2KLayout(BlockLayout):
    """Q2_K: 16 bytes of sub-scale (low) and sub-minimum (high) nibbles, bit pairs, fp16 d and dmin."""

    name = "Q2_K"

    def pack_units(self, codes: Codes, fields: UnitFields) -> Bytes:
        groups = _groups(codes)
        subs = words(fields["sub_scale"]) | (words(fields["sub_minimum"]) << 4)
        supers = [fp16_bytes(fields["super_scale"]), fp16_bytes(fields["super_minimum"])]
        return side_by_side(len(codes), [subs, bit_pairs(*groups[:4]), bit_pairs(*groups[4:]), *supers])

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
        groups = _groups(codes)
        high = _high_bits(groups, 2)
        for group in groups:
            group &= LOW_PAIRS
        subs = fields["sub_scale"] + np.int8(32)
        tops = ((words(subs) >> 4) & LOW_PAIRS).view("<u4").reshape(-1, 4)
        pairs = tops[:, 0] | (tops[:, 1] << 2) | (tops[:, 2] << 4) | (tops[:, 3] << 6)
        parts = [high, bit_pairs(*groups[:4]), bit_pairs(*groups[4:]), _nibbles(*runs(subs, 8, 2)), pairs]
        return side_by_side(len(codes), [*parts, fp16_bytes(fields["super_scale"])])

    def unpack_units(self, units: Bytes) -> tuple[Codes, UnitFields]:
        high = _unpack_high_bits(units[:, :32])
        nibbles, pairs = units[:, 96:104], units[:, 104:108]
        low = np.concatenate([nibbles & 15, nibbles >> 4], axis=-1)
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
        groups = _groups(codes)
        parts: list[NDArray[Any]] = [fp16_bytes(fields["super_scale"]), fp16_bytes(fields["super_minimum"])]
        scale, minimum = (np.ascontiguousarray(fields[f"sub_{kind}"]).view("<u4") for kind in ("scale", "minimum"))
        parts += [sub[:, 0] | ((sub[:, 1] & _TOP_PAIRS) << 2) for sub in (scale, minimum)]
        parts.append((scale[:, 1] & _NIBBLES) | ((minimum[:, 1] & _NIBBLES) << 4))
        if self.bits == 5:
            parts.append(_high_bits(groups, 4))
        parts += [_nibbles(low, high) for low, high in zip(groups[0::2], groups[1::2], strict=True)]
        return side_by_side(len(codes), parts)

    def unpack_units(self, units: Bytes) -> tuple[Codes, UnitFields]:
        first, low = (units[:, 4:8], units[:, 8:12]), units[:, 12:16]
        nibbles = (low & 15, low >> 4)
        scale, minimum = (
            np.concatenate([six & 63, nibble | ((six >> 6) << 4)], axis=-1)
            for six, nibble in zip(first, nibbles, strict=True)
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
        groups = _groups(codes)
        nibbles = [_nibbles(groups[i], groups[i + 2]) for i in (0, 1, 4, 5)]
        for group in groups:
            group >>= 4
            group &= LOW_PAIRS
        pairs = [bit_pairs(*groups[:4]), bit_pairs(*groups[4:])]
        return side_by_side(
            len(codes), [*nibbles, *pairs, fields["sub_scale"], fp16_bytes(fields["super_scale"])]
        )

    def unpack_units(self, units: Bytes) -> tuple[Codes, UnitFields]:
        nibbles = units[:, :128].reshape(-1, 2, 2, 32)
        low = np.concatenate([nibbles & 15, nibbles >> 4], axis=2).reshape(-1, 256)
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
        nibbles = _nibbles(*runs(codes, 16, 2))
        return side_by_side(len(codes), [fp16_bytes(fields["super_scale"]), high, low, nibbles])

    def unpack_units(self, units: Bytes) -> tuple[Codes, UnitFields]:
        high = ((units[:, 2:4, None] >> BIT_PAIRS) & 3).reshape(-1, 8)
        low = np.stack([units[:, 4:8] & 15, units[:, 4:8] >> 4], axis=-1).reshape(-1, 8)
        sub_scale = (low | (high << 4)).view(np.int8) - np.int8(32)
        runs = units[:, 8:].reshape(-1, 8, 1, 16)
        codes = np.concatenate([runs & 15, runs >> 4], axis=2).reshape(-1, 256)
        return codes, {"sub_scale": sub_scale, "super_scale": fp16_values(units[:, :2])}
