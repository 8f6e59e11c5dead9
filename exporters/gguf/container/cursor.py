"""Reading the values of a GGUF file's head one after the other, none beyond its end or without bound."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

from gguf import GGUFValueType

from signround_edge.errors import UserError

_MAX_ARRAY_DEPTH = 4
_MAX_ITEMS = 1 << 24  # of one array or text: far above any tokenizer, and a bound on what damage can allocate
MAX_NAME = 63  # bytes; GGMLMAX_NAME without the closing zero

_COUNT = struct.Struct("<Q")

_SCALARS: dict[GGUFValueType, str] = {
    GGUFValueType.UINT8: "<B",
    GGUFValueType.INT8: "<b",
    GGUFValueType.UINT16: "<H",
    GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I",
    GGUFValueType.INT32: "<i",
    GGUFValueType.FLOAT32: "<f",
    GGUFValueType.BOOL: "<?",
    GGUFValueType.UINT64: "<Q",
    GGUFValueType.INT64: "<q",
    GGUFValueType.FLOAT64: "<d",
}


class Cursor:
    """A read position that refuses to leave the file's head."""

    def __init__(self, data: memoryview, path: Path) -> None:
        self.data = data
        self.path = path
        self.position = 0

    @property
    def left(self) -> int:
        return len(self.data) - self.position

    def damaged(self, what: str) -> UserError:
        return UserError(f"{self.path} is a damaged or truncated GGUF file ({what}); export or download it again")

    def scalar(self, code: str) -> Any:
        size = struct.calcsize(code)
        if self.left < size:
            raise self.damaged("it ends within its head")
        (value,) = struct.unpack_from(code, self.data, self.position)
        self.position += size
        return value

    def count(self, smallest: int, what: str) -> int:
        """A 64-bit count of things of at least `smallest` bytes each."""
        count = int(self.scalar("<Q"))
        if count * smallest > self.left:
            raise self.damaged(f"it announces {count} {what}, more than fit into it")
        if count > _MAX_ITEMS:
            raise self.damaged(f"it announces {count} {what}")
        return count

    def name(self, what: str) -> str:
        """Text that shows up in messages and tables, so it must be printable on one line."""
        name = self.string()
        if not name or not name.isprintable():
            raise self.damaged(f"{what} is called {name[:MAX_NAME]!r}")
        return name

    def string(self) -> str:
        length = self.count(1, "bytes of text")
        raw = bytes(self.data[self.position : self.position + length])
        self.position += length
        # Tokenizers hold byte sequences that are no UTF-8; surrogateescape brings them back unchanged on writing.
        return raw.decode("utf-8", errors="surrogateescape")

    def strings(self, count: int) -> list[str]:
        """As many as `string` would give, several times faster: a tokenizer has some hundred thousand of them."""
        data, position, end = self.data, self.position, len(self.data)
        found = []
        for _ in range(count):
            start = position + 8
            length = _COUNT.unpack_from(data, position)[0] if start <= end else end
            position = start + length
            if position > end or length > _MAX_ITEMS:
                self.position = start - 8
                self.string()  # says what is wrong
            found.append(str(data[start:position], "utf-8", "surrogateescape"))
        self.position = position
        return found

    def value_type(self) -> GGUFValueType:
        number = self.scalar("<I")
        try:
            return GGUFValueType(number)
        except ValueError:
            raise self.damaged(f"metadata of unknown type {number}") from None

    def value(self, kind: GGUFValueType, depth: int = 0) -> tuple[Any, GGUFValueType | None]:
        if kind is GGUFValueType.STRING:
            return self.string(), None
        if kind is not GGUFValueType.ARRAY:
            return self.scalar(_SCALARS[kind]), None
        item = self.value_type()
        if depth >= _MAX_ARRAY_DEPTH:
            raise self.damaged("arrays nested too deep")
        if item in _SCALARS:
            code = _SCALARS[item]
            width = struct.calcsize(code)
            count = self.count(width, "values")
            values = struct.unpack_from(f"<{count}{code[1]}", self.data, self.position)
            self.position += count * width
            return list(values), item
        count = self.count(8, "strings")
        if item is GGUFValueType.STRING:
            return self.strings(count), item
        return [self.value(item, depth + 1)[0] for _ in range(count)], item
