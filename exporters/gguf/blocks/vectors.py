"""Layouts of the block types whose codes are vectors of a table: IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS and IQ3_S.

Stored are the numbers of entries, signs of eight values in a byte (the first in the lowest bit), of which seven suffice
where an even number is negative, and sub-scales of four bits.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from exporters.gguf.blocks.layout import BlockLayout, Bytes, Codes, UnitFields, fp16_bytes, fp16_values, side_by_side
from signround_edge.formats import get_grid
from signround_edge.formats.ggml_vectors import VectorGrid

_UNITS_AT_ONCE = 1 << 14
_SEVENS = np.arange(0, 28, 7, dtype=np.uint32)  # where each of four signs of seven bits begins in a word
_BIT_PAIRS = np.arange(0, 8, 2, dtype=np.uint8)


def vector_grid(name: str) -> VectorGrid:
    """The grid of a layout's name."""
    grid = get_grid(name)
    assert isinstance(grid, VectorGrid)
    return grid


def numbers_of(name: str, codes: Codes) -> NDArray[np.uint16]:
    """Numbers in the table of all groups of codes uint8 [U, 256]: [U, entries]."""
    numbers = vector_grid(name).entry_numbers(torch.from_numpy(codes)).numpy()
    return numbers.view(np.uint16).reshape(len(codes), -1)


def entries_of(name: str, numbers: NDArray[Any]) -> Bytes:
    """The entries of these numbers [U, entries], uint8 [U, 256]: places among the table's magnitudes."""
    entries = vector_grid(name).vectors.entries(torch.device("cpu")).to(torch.uint8).numpy()
    found: Bytes = entries[numbers].reshape(len(numbers), -1)
    return found


def in_pieces(pack: Callable[[Codes, UnitFields], Bytes], codes: Codes, fields: UnitFields, unit_bytes: int) -> Bytes:
    """What `pack` makes of some units at a time: what is between takes many times the memory of codes."""
    packed = np.empty((len(codes), unit_bytes), dtype=np.uint8)
    for start in range(0, len(codes), _UNITS_AT_ONCE):
        part = slice(start, start + _UNITS_AT_ONCE)
        packed[part] = pack(codes[part], {name: field[part] for name, field in fields.items()})
    return packed


class VectorLayout(BlockLayout):
    """What the five share: from codes to numbers of entries and signs, and back. Subclasses lay those out."""

    @abstractmethod
    def pack_numbers(self, numbers: NDArray[np.uint16], signs: Bytes, subs: Bytes) -> list[NDArray[Any]]:
        """All parts behind d, of numbers [U, entries], signs [U, 32] and sub-scales [U, n]."""

    @abstractmethod
    def unpack_numbers(self, data: Bytes) -> tuple[NDArray[Any], Bytes, Bytes]:
        """The inverse of `pack_numbers`, of all bytes behind d; of signs of seven bits the eighth may be anything."""

    def pack_units(self, codes: Codes, fields: UnitFields) -> Bytes:
        return in_pieces(self._pack, codes, fields, self.unit_bytes)

    def _pack(self, codes: Codes, fields: UnitFields) -> Bytes:
        units = len(codes)
        numbers = numbers_of(self.name, codes)
        signs = np.packbits(codes < vector_grid(self.name).anchor, axis=-1, bitorder="little")
        return side_by_side(
            units, [fp16_bytes(fields["super_scale"]), *self.pack_numbers(numbers, signs, fields["sub_scale"])]
        )

    def unpack_units(self, units: Bytes) -> tuple[Codes, UnitFields]:
        grid = vector_grid(self.name)
        numbers, signs, subs = self.unpack_numbers(np.ascontiguousarray(units[:, 2:]))
        if grid.vectors.even_signs:
            seven = signs & 127
            parity = seven ^ (seven >> 4)
            parity = parity ^ (parity >> 2)
            signs = (seven | (((parity ^ (parity >> 1)) & 1) << 7)).astype(np.uint8)
        magnitude = entries_of(self.name, numbers)
        negative = np.unpackbits(np.ascontiguousarray(signs), axis=-1, bitorder="little").astype(bool)
        codes: Codes = np.where(negative, grid.anchor - 1 - magnitude, grid.anchor + magnitude).astype(np.uint8)
        return codes, {"sub_scale": subs, "super_scale": fp16_values(units[:, :2])}


def _nibble_pairs(subs: Bytes) -> Bytes:
    """Sub-scales [U, 2n] as [U, n]: the first of two in the low nibble."""
    return (subs[:, ::2] | (subs[:, 1::2] << 4)).astype(np.uint8)


def _from_nibble_pairs(data: Bytes) -> Bytes:
    return np.stack([data & 15, data >> 4], axis=-1).reshape(len(data), -1)


def _sign_words(signs: Bytes, subs: Bytes) -> NDArray[np.uint32]:
    """[U, 8] words of four signs of seven bits and a sub-scale above them."""
    sevens = (signs.reshape(len(signs), 8, 4) & 127).astype(np.uint32) << _SEVENS
    found: NDArray[np.uint32] = np.bitwise_or.reduce(sevens, axis=-1) | (subs.astype(np.uint32) << 28)
    return found


def _from_sign_words(words: NDArray[np.uint32]) -> tuple[Bytes, Bytes]:
    signs = (words[..., None] >> _SEVENS).astype(np.uint8).reshape(len(words), -1)
    return signs, (words >> 28).astype(np.uint8)


class IQ2XXSLayout(VectorLayout):
    """IQ2_XXS: for each 32 values four bytes of numbers and a word of signs and sub-scale."""

    name = "IQ2_XXS"

    def pack_numbers(self, numbers: NDArray[np.uint16], signs: Bytes, subs: Bytes) -> list[NDArray[Any]]:
        low = numbers.astype(np.uint8).reshape(-1, 8, 4)
        words = _sign_words(signs, subs).view(np.uint8).reshape(-1, 8, 4)
        return [np.concatenate([low, words], axis=-1)]

    def unpack_numbers(self, data: Bytes) -> tuple[NDArray[Any], Bytes, Bytes]:
        pairs = data.reshape(-1, 8, 8)
        words = np.ascontiguousarray(pairs[..., 4:]).view("<u4")[..., 0]
        return pairs[..., :4].reshape(len(data), -1), *_from_sign_words(words)


class IQ2XSLayout(VectorLayout):
    """IQ2_XS: 16-bit words of a number (9 bits) and seven signs, then sub-scales."""

    name = "IQ2_XS"

    def pack_numbers(self, numbers: NDArray[np.uint16], signs: Bytes, subs: Bytes) -> list[NDArray[Any]]:
        return [numbers | (signs.astype(np.uint16) << 9), _nibble_pairs(subs)]

    def unpack_numbers(self, data: Bytes) -> tuple[NDArray[Any], Bytes, Bytes]:
        words = np.ascontiguousarray(data[:, :64]).view("<u2")
        return words & 511, (words >> 9).astype(np.uint8), _from_nibble_pairs(data[:, 64:])


class IQ2SLayout(VectorLayout):
    """IQ2_S: low bytes of numbers, signs, two more bits of each four numbers in a byte, sub-scales."""

    name = "IQ2_S"

    def pack_numbers(self, numbers: NDArray[np.uint16], signs: Bytes, subs: Bytes) -> list[NDArray[Any]]:
        high = (numbers >> 8).astype(np.uint8).reshape(len(numbers), 8, 4) << _BIT_PAIRS
        return [numbers.astype(np.uint8), signs, np.bitwise_or.reduce(high, axis=-1), _nibble_pairs(subs)]

    def unpack_numbers(self, data: Bytes) -> tuple[NDArray[Any], Bytes, Bytes]:
        high = ((data[:, 64:72, None] >> _BIT_PAIRS) & 3).reshape(len(data), -1)
        return data[:, :32] | (high.astype(np.uint16) << 8), data[:, 32:64], _from_nibble_pairs(data[:, 72:])


class IQ3XXSLayout(VectorLayout):
    """IQ3_XXS: a byte a number, then for each 32 values a word of signs and sub-scale."""

    name = "IQ3_XXS"

    def pack_numbers(self, numbers: NDArray[np.uint16], signs: Bytes, subs: Bytes) -> list[NDArray[Any]]:
        return [numbers.astype(np.uint8), _sign_words(signs, subs)]

    def unpack_numbers(self, data: Bytes) -> tuple[NDArray[Any], Bytes, Bytes]:
        return data[:, :64], *_from_sign_words(np.ascontiguousarray(data[:, 64:]).view("<u4"))


class IQ3SLayout(VectorLayout):
    """IQ3_S: low bytes of numbers, the ninth bits of eight in a byte, signs, sub-scales."""

    name = "IQ3_S"

    def pack_numbers(self, numbers: NDArray[np.uint16], signs: Bytes, subs: Bytes) -> list[NDArray[Any]]:
        high = np.packbits(numbers >= 256, axis=-1, bitorder="little")
        return [numbers.astype(np.uint8), high, signs, _nibble_pairs(subs)]

    def unpack_numbers(self, data: Bytes) -> tuple[NDArray[Any], Bytes, Bytes]:
        high = np.unpackbits(np.ascontiguousarray(data[:, 64:72]), axis=-1, bitorder="little")
        return data[:, :64] | (high.astype(np.uint16) << 8), data[:, 72:104], _from_nibble_pairs(data[:, 104:])
