"""Writing model.onnx and its data files, one tensor in memory at a time."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

import onnx_ir as ir

from exporters.onnx.passes.graph_edit import SHARES_BYTES

# Smaller initializers go into model.onnx itself, where shape inference finds constants.
INLINE_BELOW = 1024
# Large tensors start on a page, so that every ONNX Runtime can map them instead of copying.
_PAGE, _PAGED_FROM, _ALIGNMENT = 4096, 1 << 20, 64


class _DataFiles:
    """model.onnx.data, and model.onnx.data_1 and so on where one file may not grow beyond a limit.

    Attributes:
        model: path of model.onnx.
        most: bytes of a file at most; a larger tensor has a file of its own. None for no limit.
        ending: of a data file's name, before its number.
        empty: whether holes are written in the place of data, which take no room.
    """

    def __init__(self, model: Path, most: int | None, ending: str, empty: bool) -> None:
        self.model, self.most, self.ending, self.empty = model, most, ending, empty
        self._count = 0
        self._file = self._open()

    def store(self, value: ir.Value) -> ir.TensorProtocol:
        """Write a tensor's data; returns it as a reference to its place."""
        tensor = value.const_value
        alignment = _PAGE if tensor.nbytes >= _PAGED_FROM else _ALIGNMENT
        start = self._file.tell() + -self._file.tell() % alignment
        if self.most is not None and start and start + tensor.nbytes > self.most:
            self._file.close()
            self._count += 1
            self._file, start = self._open(), 0
        self._file.write(b"\0" * (start - self._file.tell()))
        if self.empty:
            self._file.truncate(start + tensor.nbytes)
            self._file.seek(0, os.SEEK_END)
        else:
            tensor.tofile(self._file)  # without another copy in memory
        return _external(value, Path(self._file.name).name, start, self._file.tell() - start, self.model)

    def close(self) -> None:
        """Close the last file."""
        self._file.close()

    def _open(self) -> BinaryIO:
        number = f"_{self._count}" if self._count else ""
        return self.model.with_name(f"{self.model.name}{self.ending}{number}").open("wb")


def write_model(
    model: ir.Model, path: Path, max_shard_bytes: int | None = None, ending: str = ".data", empty: bool = False
) -> None:
    """Write the model at `path` and its data beside it; initializers marked SHARES_BYTES point at another's data.

    Args:
        max_shard_bytes: split the data into files of at most so many bytes.
        ending: of the name of the data's file.
        empty: leave the data out: files of the same lengths, full of holes.
    """
    initializers = model.graph.initializers
    shared = [v for v in initializers.values() if SHARES_BYTES in v.meta]
    files = _DataFiles(path, max_shard_bytes, ending, empty)
    try:
        for value in initializers.values():
            if SHARES_BYTES in value.meta:
                continue
            tensor = value.const_value
            inline = tensor.nbytes < INLINE_BELOW
            value.const_value = ir.Tensor(tensor.numpy().copy(), name=value.name) if inline else files.store(value)
    finally:
        files.close()
    for value in shared:
        source = initializers[value.meta[SHARES_BYTES]].const_value
        value.const_value = (
            _external(value, source.location, source.offset, source.length, path)
            if isinstance(source, ir.ExternalTensor)
            else ir.Tensor(value.const_value.numpy(), name=value.name)
        )
    ir.save(model, path)


def _external(value: ir.Value, location: str, offset: int, length: int, path: Path) -> ir.ExternalTensor:
    tensor = value.const_value
    return ir.ExternalTensor(
        location, offset, length, tensor.dtype, shape=tensor.shape, name=value.name, base_dir=path.parent
    )
