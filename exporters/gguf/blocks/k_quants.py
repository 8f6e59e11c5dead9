"""Layouts of the block types with super-blocks of 256 values: Q2_K to Q6_K and IQ4_XS."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporters.gguf.blocks.layout import BIT_PAIRS, BlockLayout, Bytes, Codes, UnitFields, fp16_bytes, fp16_values

_PAIRS = BIT_PAIRS.reshape(4, 1)


def _pack_bit_pairs(codes: Codes) -> Bytes:
    """2-bit codes [U, 256] as [U, 64] bytes: each half of 128 is four groups of 32 that share 32 bytes."""
    pairs: Bytes = np.bitwise_or.reduce(codes.reshape(-1, 2, 4, 32) << _PAIRS, axis=2)
    return pairs.reshape(-1, 64)


def _unpack_bit_pairs(data: Bytes) -> Codes:
    """The inverse of `_pack_bit_pairs`."""
    return ((data.reshape(-1, 2, 1, 32) >> _PAIRS) & 3).reshape(-1, 256)


def _pack_nibble_runs(codes: Codes) -> Bytes:
    """4-bit codes [U, 256] as [U, 128] bytes: of each 64 values, the first 32 are low nibbles, the others high."""
    runs = codes.reshape(-1, 4, 2, 32)
    nibbles: Bytes = runs[:, :, 0] | (runs[:, :, 1] << 4)
    return nibbles.reshape(-1, 128)


def _unpack_nibble_runs(data: Bytes) -> Codes:
    """The inverse of `_pack_nibble_runs`."""
    runs = data.reshape(-1, 4, 1, 32)
    return np.concatenate([runs & 15, runs >> 4], axis=2).reshape(-1, 256)


def _pack_high_bits(bits: Codes) -> Bytes:
    """Single bits [U, 256] as [U, 32] bytes: bit g of byte l belongs to value l of group g of 32."""
    return np.packbits(bits.reshape(-1, 8, 32), axis=1, bitorder="little").reshape(-1, 32)


def _unpack_high_bits(data: Bytes) -> Codes:
    """The inverse of `_pack_high_bits`."""
    return np.unpackbits(data[:, None, :], axis=1, bitorder="little").reshape(-1, 256)


class Q2KLayout(BlockLayout):
    """Q2_K: 16 bytes of sub-scale (low) and sub-minimum (high) nibbles, bit pairs, fp16 d and dmin."""

    name = "Q2_K"

    def pack_units(self, codes: Codes, fields: UnitFields) -> Bytes:
        subs = fields["sub_scale"] | (fields["sub_minimum"] << 4)
        supers = [fp16_bytes(fields["super_scale"]), fp16_bytes(fields["super_minimum"])]
        return np.concatenate([subs, _pack_bit_pairs(codes), *supers], axis=-1)

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
        high = _pack_high_bits(codes >> 2)
        subs = (fields["sub_scale"] + np.int8(32)).view(np.uint8)
        nibbles = (subs & 15)[:, :8] | ((subs & 15)[:, 8:] << 4)
        pairs = np.bitwise_or.reduce((subs >> 4).reshape(-1, 4, 4) << _PAIRS, axis=1)
        parts = [high, _pack_bit_pairs(codes & 3), nibbles, pairs, fp16_bytes(fields["super_scale"])]
        return np.concatenate(parts, axis=-1)

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
        scale, minimum = fields["sub_scale"], fields["sub_minimum"]
        parts: list[NDArray[Any]] = [fp16_bytes(fields["super_scale"]), fp16_bytes(fields["super_minimum"])]
        parts += [sub[:, :4] | ((sub[:, 4:] >> 4) << 6) for sub in (scale, minimum)]
        parts.append((scale[:, 4:] & 15) | ((minimum[:, 4:] & 15) << 4))
        if self.bits == 5:
            parts.append(_pack_high_bits(codes >> 4))
        return np.concatenate([*parts, _pack_nibble_runs(codes & 15)], axis=-1)

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
        low = codes.reshape(-1, 2, 4, 32) & 15
        nibbles = (low[:, :, :2] | (low[:, :, 2:] << 4)).reshape(-1, 128)
        parts = [nibbles, _pack_bit_pairs(codes >> 4), fields["sub_scale"].view(np.uint8)]
        return np.concatenate([*parts, fp16_bytes(fields["super_scale"])], axis=-1)

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
        subs = (fields["sub_scale"] + np.int8(32)).view(np.uint8)
        high = np.bitwise_or.reduce((subs >> 4).reshape(-1, 2, 4) << BIT_PAIRS, axis=-1)
        low = (subs[:, 0::2] & 15) | ((subs[:, 1::2] & 15) << 4)
        runs = codes.reshape(-1, 8, 2, 16)
        nibbles = (runs[:, :, 0] | (runs[:, :, 1] << 4)).reshape(-1, 128)
        return np.concatenate([fp16_bytes(fields["super_scale"]), high, low, nibbles], axis=-1)

    def unpack_units(self, units: Bytes) -> tuple[Codes, UnitFields]:
        high = ((units[:, 2:4, None] >> BIT_PAIRS) & 3).reshape(-1, 8)
        low = np.stack([units[:, 4:8] & 15, units[:, 4:8] >> 4], axis=-1).reshape(-1, 8)
        sub_scale = (low | (high << 4)).view(np.int8) - np.int8(32)
        runs = units[:, 8:].reshape(-1, 8, 1, 16)
        codes = np.concatenate([runs & 15, runs >> 4], axis=2).reshape(-1, 256)
        return codes, {"sub_scale": sub_scale, "super_scale": fp16_values(units[:, :2])}
