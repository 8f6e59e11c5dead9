"""Writing a GGUF file: head by gguf's GGUFWriter, then tensor data streamed, and the file appears only when whole."""

from __future__ import annotations

import errno
import io
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from gguf import GGUF_DEFAULT_ALIGNMENT, GGUFWriter
from numpy.typing import NDArray

from exporters.gguf.blocks.ggml_types import GgmlType
from exporters.gguf.container.reader import MAGIC
from exporters.gguf.container.splits import SPLIT_COUNT, SPLIT_NO, SPLIT_TENSORS, split_path
from signround_edge.errors import UserError
from signround_edge.files import is_disk_full, whole_files
from signround_edge.outputs import check_output

_HEAD_ROOM = 1 << 20


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the file to be: its description now, its data when its turn comes.

    Attributes:
        name: GGUF tensor name.
        ggml_type: how the data is stored.
        shape: logical shape, rows first ([rows, values a row], or [n]).
        nbytes: bytes of the data.
        data: yields arrays whose bytes, joined, are the data.
    """

    name: str
    ggml_type: GgmlType
    shape: tuple[int, ...]
    nbytes: int
    data: Callable[[], Iterator[NDArray[Any]]]


def check_target(path: Path, inputs: Mapping[str, Path | None], flag: str = "-o") -> None:
    """UserError unless a GGUF file may be written at `path`: a new name, an empty file, or a GGUF file to replace.

    Args:
        inputs: flag or argument → what the command reads; see `check_output`.
        flag: that the path was given by.
    """
    check_output(flag, path, inputs)
    if not path.exists():
        return
    if not path.is_file():
        what = "a folder; give the name of a file" if path.is_dir() else f"no regular file; give another {flag}"
        raise UserError(f"{flag} {path} is {what}")
    with path.open("rb") as file:
        start = file.read(len(MAGIC))
    if start not in (b"", MAGIC):
        raise UserError(
            f"{flag} {path} exists and is no GGUF file, so it is not replaced; give another {flag}, or remove it first"
        )


def write_file(
    path: Path,
    writer: GGUFWriter,
    tensors: Iterable[PlannedTensor],
    max_bytes: int | None = None,
    inputs: Mapping[str, Path | None] = MappingProxyType({}),
    flag: str = "-o",
) -> Path:
    """Write the metadata collected in `writer` and the tensors to `path`, one tensor in memory at a time.

    The file, or all of several, appear whole or not at all.

    Args:
        writer: a GGUFWriter without file and without tensors.
        max_bytes: split into files of at most so many bytes of tensor data (or one tensor), named as llama.cpp wants
            them; the first holds all metadata.
        inputs, flag: as for `check_target`, which every file has to pass.
    Returns:
        The file to load: `path`, or the first of several.
    Raises:
        UserError: the disk is full or cannot be written, or something else than a GGUF file is in the way.
    """
    groups = _grouped(list(tensors), max_bytes)
    count = len(groups)
    paths = [path] if count == 1 else [split_path(path, i, count) for i in range(count)]
    for target in paths:
        check_target(target, inputs, flag)
    writers = [writer, *(GGUFWriter(None, writer.arch) for _ in groups[1:])]
    needed = sum(t.nbytes for group in groups for t in group) + _HEAD_ROOM
    with _as_user_errors(path, needed, flag), whole_files(*paths) as partials:
        disk = shutil.disk_usage(path.parent)
        if disk.free < needed and disk.total:  # of no size at all is what holds no files of ours, such as /proc
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        for index, (own, group, partial) in enumerate(zip(writers, groups, partials, strict=True)):
            if count > 1:
                own.add_uint16(SPLIT_NO, index)
                own.add_uint16(SPLIT_COUNT, count)
                own.add_int32(SPLIT_TENSORS, sum(map(len, groups)))
            _write_one(own, group, partial)
    return paths[0]


def _grouped(tensors: list[PlannedTensor], max_bytes: int | None) -> list[list[PlannedTensor]]:
    """The tensors of each file, in order."""
    groups: list[list[PlannedTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if max_bytes is not None and groups[-1] and size + tensor.nbytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.nbytes
    return groups


def padded_bytes(tensor: PlannedTensor, alignment: int = int(GGUF_DEFAULT_ALIGNMENT)) -> int:
    """Bytes that a tensor takes in the file, padding included."""
    return tensor.nbytes + -tensor.nbytes % alignment


def head_bytes(writer: GGUFWriter, tensors: Iterable[PlannedTensor]) -> int:
    """Bytes of all that is in front of the tensors' data. The writer is used up."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "head.gguf"
        _describe(writer, tensors)
        _write_head(writer, path)
        return path.stat().st_size


def _describe(writer: GGUFWriter, tensors: Iterable[PlannedTensor]) -> None:
    for tensor in tensors:
        # float32 as dtype: gguf takes the shape as logical then; raw_dtype is what is stored.
        number: Any = tensor.ggml_type.number  # gguf-py wants its enum, which lacks some types, and only writes it
        writer.add_tensor_info(tensor.name, tensor.shape, np.float32, tensor.nbytes, raw_dtype=number)


def _write_one(writer: GGUFWriter, tensors: list[PlannedTensor], partial: Path) -> None:
    """One of the files."""
    _describe(writer, tensors)
    _write_head(writer, partial)
    alignment = writer.data_alignment
    with partial.open("r+b", buffering=0) as out:
        start = out.seek(0, os.SEEK_END)
        end = start + sum(padded_bytes(tensor, alignment) for tensor in tensors)
        _reserve(out.fileno(), start, end)
        for tensor in tensors:
            _write_tensor(out, tensor, alignment)
        assert out.tell() == end, (out.tell(), end)


def _reserve(file: int, start: int, end: int) -> None:
    """Give a file the room for what follows, where the system can: a full disk shows now, and writing costs less.

    On ext4 it takes the kernel half of the time then, or less.
    """
    if end > start and hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file, start, end - start)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):  # not on every file system
                raise


def _write_head(writer: GGUFWriter, partial: Path) -> None:
    """Header, metadata and tensor descriptions, padded to where the data starts."""
    try:
        writer.write_header_to_file(partial)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()
    size = partial.stat().st_size
    with partial.open("ab") as out:
        out.write(bytes(-size % writer.data_alignment))


def _write_tensor(out: io.RawIOBase, tensor: PlannedTensor, alignment: int) -> None:
    written = 0
    for piece in tensor.data():
        data = np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data
        _write(out, data)
        written += data.nbytes
    assert written == tensor.nbytes, (tensor.name, written, tensor.nbytes)
    _write(out, memoryview(bytes(-written % alignment)))


def _write(out: io.RawIOBase, data: memoryview) -> None:
    """All of it: one call of the system writes at most 2 GB, and what fits on the disk."""
    while data:
        data = data[out.write(data) :]


@contextmanager
def _as_user_errors(path: Path, needed: int, flag: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if is_disk_full(error):
            raise UserError(
                f"{path} was not written: the disk is full; free {needed / 1e6:.0f} MB there or choose another {flag}"
            ) from error
        raise UserError(
            f"{path} was not written ({error.strerror or error}); choose another {flag} or check its folder"
        ) from error
