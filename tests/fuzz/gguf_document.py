"""A GGUF file taken apart and put together again, with lies allowed. Independent of the product's reader and writer.

Layout: ggml/docs/gguf.md. Everything is little-endian; data is kept beside the description of its tensor.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from gguf import GGML_QUANT_SIZES

STRING, ARRAY, BOOL = 8, 9, 7
FLOATS = (6, 12)
CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_BLOCKS = {int(kind): sizes for kind, sizes in GGML_QUANT_SIZES.items()}


class Span(NamedTuple):
    """A field of a written file: what it is, where it begins, and its bytes."""

    what: str
    offset: int
    size: int


@dataclass
class Entry:
    """A metadata entry: `payload` is the encoded value, or None for an array, which has `items` instead."""

    key: bytes
    kind: int
    payload: bytes | None
    item_kind: int = 0
    items: list[bytes] = field(default_factory=list)

    def number(self) -> Any:
        """The value of a scalar."""
        assert self.payload is not None
        return struct.unpack(f"<{CODES[self.kind]}", self.payload)[0]


@dataclass
class Tensor:
    """A tensor's description and data; an `offset` of None is where the data really is, without `data` it has none."""

    name: bytes
    dims: list[int]
    kind: int
    data: bytes
    offset: int | None = None


@dataclass
class Document:
    """A whole file."""

    version: int
    entries: list[Entry]
    tensors: list[Tensor]
    alignment: int = 32

    @classmethod
    def parse(cls, data: bytes) -> Document:
        """Take a sound file apart; anything else raises one of MALFORMED."""
        cursor = _Cursor(data, 4)
        if data[:4] != b"GGUF":
            raise ValueError("no GGUF file")
        version, tensors, entries = cursor.take("I"), cursor.take("Q"), cursor.take("Q")
        found = cls(version, [cursor.entry() for _ in range(entries)], [cursor.tensor() for _ in range(tensors)])
        aligned = [e.number() for e in found.entries if e.key == b"general.alignment"]
        found.alignment = aligned[0] if aligned else 32
        if not found.tensors or not found.entries or not 0 < found.alignment <= 1 << 16:
            raise ValueError("nothing to damage")
        start = cursor.position + -cursor.position % found.alignment
        for tensor in found.tensors:
            assert tensor.offset is not None
            values, size = _BLOCKS[tensor.kind]
            count = size
            for dim in tensor.dims:
                count *= dim
            begin = start + tensor.offset
            tensor.data, tensor.offset = data[begin : begin + count // values], None
        return found

    def entry(self, key: bytes) -> Entry | None:
        """The first entry of that key."""
        return next((e for e in self.entries if e.key == key), None)

    def write(self) -> tuple[bytes, list[Span]]:
        """The file and where its fields are."""
        out = _Writer()
        out.add("magic", b"GGUF")
        out.number("version", "I", self.version)
        out.number("tensor count", "Q", len(self.tensors))
        out.number("entry count", "Q", len(self.entries))
        for entry in self.entries:
            out.entry(entry)
        offset = 0
        for tensor in self.tensors:
            out.tensor(tensor, offset if tensor.offset is None else tensor.offset)
            offset += len(tensor.data) + -len(tensor.data) % self.alignment
        out.add("padding", bytes(-len(out.data) % self.alignment))
        for tensor in self.tensors:
            out.add("data", tensor.data)
            out.add("padding", bytes(-len(tensor.data) % self.alignment))
        return bytes(out.data), out.spans


MALFORMED = (ArithmeticError, AssertionError, LookupError, MemoryError, TypeError, ValueError, struct.error)


def text(content: bytes) -> bytes:
    """A string as stored: its length and its bytes."""
    return struct.pack("<Q", len(content)) + content


def number(kind: int, value: float) -> bytes:
    """A scalar as stored; integers wrap around, floats overflow to infinity."""
    if kind == BOOL:
        return bytes([value != 0])
    if kind in FLOATS:
        try:
            return struct.pack(f"<{CODES[kind]}", value)
        except OverflowError:
            return struct.pack(f"<{CODES[kind]}", float("inf"))
    if isinstance(value, float) and not math.isfinite(value):
        value = 0
    width = struct.calcsize(CODES[kind])
    return (int(value) % (1 << 8 * width)).to_bytes(width, "little")


class _Cursor:
    def __init__(self, data: bytes, position: int) -> None:
        self.data = data
        self.position = position

    def take(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self.data, self.position)
        self.position += struct.calcsize(code)
        return value

    def raw(self, size: int) -> bytes:
        if self.position + size > len(self.data):
            raise ValueError("beyond the end")
        self.position += size
        return self.data[self.position - size : self.position]

    def string(self) -> bytes:
        return self.raw(self.take("Q"))

    def value(self, kind: int) -> bytes:
        return text(self.string()) if kind == STRING else self.raw(struct.calcsize(CODES[kind]))

    def entry(self) -> Entry:
        key, kind = self.string(), self.take("I")
        if kind != ARRAY:
            return Entry(key, kind, self.value(kind))
        item_kind, count = self.take("I"), self.take("Q")
        if count > len(self.data):
            raise ValueError("beyond the end")
        return Entry(key, kind, None, item_kind, [self.value(item_kind) for _ in range(count)])

    def tensor(self) -> Tensor:
        name, n_dims = self.string(), self.take("I")
        if n_dims > 8:
            raise ValueError("too many dimensions")
        dims = [self.take("Q") for _ in range(n_dims)]
        return Tensor(name, dims, self.take("I"), b"", self.take("Q"))


class _Writer:
    def __init__(self) -> None:
        self.data = bytearray()
        self.spans: list[Span] = []

    def add(self, what: str, content: bytes) -> None:
        self.spans.append(Span(what, len(self.data), len(content)))
        self.data += content

    def number(self, what: str, code: str, value: int) -> None:
        width = struct.calcsize(code)
        self.add(what, (value % (1 << 8 * width)).to_bytes(width, "little"))

    def entry(self, entry: Entry) -> None:
        self.number("key length", "Q", len(entry.key))
        self.add("key", entry.key)
        self.number("value type", "I", entry.kind)
        if entry.payload is not None:
            if entry.kind == STRING:
                self.add("text length", entry.payload[:8])
                self.add("text", entry.payload[8:])
            else:
                self.add("value", entry.payload)
            return
        self.number("item type", "I", entry.item_kind)
        self.number("array length", "Q", len(entry.items))
        self.add("items", b"".join(entry.items))

    def tensor(self, tensor: Tensor, offset: int) -> None:
        self.number("name length", "Q", len(tensor.name))
        self.add("name", tensor.name)
        self.number("dimension count", "I", len(tensor.dims))
        for dim in tensor.dims:
            self.number("dimension", "Q", dim)
        self.number("tensor type", "I", tensor.kind)
        self.number("tensor offset", "Q", offset)
