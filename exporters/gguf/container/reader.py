"""Reading a GGUF file's head, with every count and offset checked against the file's size before it is trusted.

gguf's own GGUFReader believes what a file says of itself; a damaged file makes it allocate without bound or fail
somewhere in numpy. Here anything that does not add up is one UserError. Layout: ggml/docs/gguf.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFValueType
from numpy.typing import NDArray

from exporters.gguf.blocks.ggml_types import BY_NUMBER, GgmlType
from exporters.gguf.container.cursor import MAX_NAME, Cursor
from exporters.gguf.container.splits import SPLIT_COUNT, SPLIT_NO, SPLIT_TENSORS, part_of, split_path
from signround_edge.errors import UserError

MAGIC = b"GGUF"
MMPROJ = "clip"  # general.architecture of the files that llama.cpp calls mmproj
VERSIONS = (2, 3)
_MAX_DIMS = 4
_SMALLEST_ENTRY = 13  # a key of no letters (8), a type (4) and one byte of value
_MAX_HEAD = 64 << 20  # bytes of everything before the data, several times the largest tokenizer: the same bound


@dataclass(frozen=True)
class MetadataValue:
    """One metadata entry: its value as Python object (arrays as lists) and its types, so that it can be copied."""

    value: Any
    type: GGUFValueType
    item_type: GGUFValueType | None = None


@dataclass(frozen=True)
class StoredTensorInfo:
    """Where a tensor lies in the file.

    Attributes:
        name: GGUF tensor name.
        ggml_type: how it is stored.
        shape: logical shape, rows first.
        offset: bytes from the start of its file.
        nbytes: bytes of the data.
        file: the file that holds it: one of several when the model is split.
    """

    name: str
    ggml_type: GgmlType
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    file: Path


@dataclass
class GgufFile:
    """The head of a GGUF file, or of all files of a split model. Tensor data is mapped, not read."""

    path: Path
    version: int
    metadata: dict[str, MetadataValue] = field(default_factory=dict)
    tensors: dict[str, StoredTensorInfo] = field(default_factory=dict)

    @property
    def architecture(self) -> str:
        """general.architecture, or "" when it is missing."""
        return str(self.get("general.architecture") or "")

    def get(self, key: str) -> Any:
        """A metadata value, or None."""
        entry = self.metadata.get(key)
        return None if entry is None else entry.value

    def raw(self, name: str) -> NDArray[np.uint8]:
        """The bytes of a tensor, mapped: uint8 [rows, bytes a row] ([1, bytes] for vectors)."""
        info = self.tensors[name]
        rows = prod(info.shape[:-1])
        if info.nbytes == 0:
            return np.zeros((rows, 0), dtype=np.uint8)
        mapped = np.memmap(info.file, mode="r", offset=info.offset, shape=(info.nbytes,), dtype=np.uint8)
        return mapped.reshape(rows, -1)

    @classmethod
    def open(cls, path: Path) -> GgufFile:
        """Parse the head. UserError when the file is missing, not GGUF, damaged or truncated.

        The first file of a split model opens all of them; `split.*` is left out of the metadata.
        """
        file = cls._open_one(path)
        count = file.get(SPLIT_COUNT) or 0  # merged by llama.cpp's gguf-split: 0
        if not isinstance(count, int) or count < 0:
            raise UserError(
                f"{path} is a damaged GGUF file ({SPLIT_COUNT} is {shown(count)}); export or download it again"
            )
        if count > 1:
            _join(file, count)
        announced = file.get(SPLIT_TENSORS)
        if announced is not None and announced != len(file.tensors):
            others = f" and its {count - 1} other files" if count > 1 else ""
            raise UserError(
                f"{path}{others} should hold {shown(announced)} tensors and hold {len(file.tensors)}; "
                "export or download the model again"
            )
        for key in (SPLIT_NO, SPLIT_COUNT, SPLIT_TENSORS):
            file.metadata.pop(key, None)
        return file

    @classmethod
    def _open_one(cls, path: Path) -> GgufFile:
        try:
            size = path.stat().st_size
            if path.is_dir():
                raise UserError(f"{path} is a folder, not a GGUF file; give the file in it")
            if size < 24:
                raise UserError(f"{path} is not a GGUF file (it has {size} bytes)")
            mapped = np.memmap(path, mode="r", dtype=np.uint8)
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}); give the path of a GGUF file") from error
        return _parse(cls(path, 0), Cursor(mapped.data[:_MAX_HEAD], path), size)


def shown(value: Any) -> str:
    """A metadata value for a message, at most 60 characters: a damaged file may hold anything of any length."""
    text = f"an array of {len(value)}" if isinstance(value, list) else repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _join(first: GgufFile, count: int) -> None:
    """Add the tensors of the other files of a split model."""
    named = part_of(first.path)
    if named is None or (named.number, named.total) != (1, count) or first.get(SPLIT_NO) != 0:
        raise UserError(
            f"{first.path} is one of {count} files of a split model; give the first, called …-00001-of-{count:05d}.gguf"
        )
    for index in range(1, count):
        path = split_path(named.model, index, count)
        if not path.is_file():
            raise UserError(
                f"{path} is missing: {first.path} is the first of {count} files; put them all in one folder"
            )
        part = GgufFile._open_one(path)
        if part.get(SPLIT_NO) != index or part.get(SPLIT_COUNT) != count or part.tensors.keys() & first.tensors.keys():
            raise UserError(f"{path} is not part {index + 1} of {first.path}; export or download the model again")
        first.tensors.update(part.tensors)


def _parse(file: GgufFile, cursor: Cursor, size: int) -> GgufFile:
    if bytes(cursor.data[:4]) != MAGIC:
        raise UserError(f"{file.path} is not a GGUF file (it does not begin with GGUF)")
    cursor.position = 4
    file.version = cursor.scalar("<I")
    if file.version not in VERSIONS:
        why = "big-endian" if file.version & 0xFFFF == 0 else f"version {file.version}"
        raise UserError(f"{file.path} is a {why} GGUF file; only little-endian version 2 and 3 can be read")
    tensor_count = cursor.count(_SMALLEST_ENTRY, "tensors")
    for _ in range(cursor.count(_SMALLEST_ENTRY, "metadata entries")):
        key = cursor.name("a metadata entry")
        kind = cursor.value_type()
        value, item = cursor.value(kind)
        if key in file.metadata:
            raise cursor.damaged(f"metadata key {key[:MAX_NAME]!r} twice")
        file.metadata[key] = MetadataValue(value, kind, item)
    alignment = file.get("general.alignment")
    alignment = 32 if alignment is None else alignment
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise cursor.damaged("general.alignment is no power of two")
    relative = [_tensor_info(cursor) for _ in range(tensor_count)]
    start = end = cursor.position + -cursor.position % alignment
    for info in relative:
        if info.name in file.tensors:
            raise cursor.damaged(f"tensor {info.name!r} twice")
        if start + info.offset + info.nbytes > size:
            raise cursor.damaged(f"the data of tensor {info.name!r} lies beyond its end")
        # llama.cpp loads only files whose tensors follow one another in the order of their descriptions.
        if start + info.offset != end:
            raise cursor.damaged(f"the data of tensor {info.name!r} does not follow that of the tensor before it")
        file.tensors[info.name] = replace(info, offset=end)
        end += info.nbytes + -info.nbytes % alignment
    if size > end:
        raise cursor.damaged(f"{size - end} bytes follow its last tensor")
    return file


def _tensor_info(cursor: Cursor) -> StoredTensorInfo:
    """One tensor description; its offset is relative to the start of the data."""
    name = cursor.name("a tensor")
    if len(name.encode()) > MAX_NAME:
        raise cursor.damaged(f"the name of tensor {name[:MAX_NAME]!r}… is longer than {MAX_NAME} bytes")
    n_dims = cursor.scalar("<I")
    if not 1 <= n_dims <= _MAX_DIMS:
        raise cursor.damaged(f"tensor {name!r} has {n_dims} dimensions")
    shape = tuple(int(cursor.scalar("<Q")) for _ in range(n_dims))[::-1]
    if not all(shape):
        raise cursor.damaged(f"tensor {name!r} has no values")
    number = cursor.scalar("<I")
    ggml_type = BY_NUMBER.get(number)
    if ggml_type is None:
        raise UserError(
            f"{cursor.path}: tensor {name!r} has type {number}, unknown to the installed gguf package; update it"
        )
    if shape[-1] % ggml_type.block_values:
        raise cursor.damaged(f"rows of tensor {name!r} are no multiple of {ggml_type.block_values}")
    return StoredTensorInfo(name, ggml_type, shape, int(cursor.scalar("<Q")), ggml_type.nbytes(shape), cursor.path)
