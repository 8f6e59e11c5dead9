"""Writing model.onnx and model.onnx.data, one tensor in memory at a time."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import onnx_ir as ir

from exporters.onnx.graph_edit import SHARES_BYTES

# Smaller initializers go into model.onnx itself, where shape inference finds constants.
_INLINE_BELOW = 1024
# Large tensors start on a page, so that every ONNX Runtime can map them instead of copying.
_PAGE, _PAGED_FROM, _ALIGNMENT = 4096, 1 << 20, 64


def write_model(model: ir.Model, path: Path) -> None:
    """Write the model at `path` and its data beside it; initializers marked SHARES_BYTES point at another's data."""
    data = path.with_name(path.name + ".data")
    initializers = model.graph.initializers
    shared = [v for v in initializers.values() if SHARES_BYTES in v.meta]
    with data.open("wb") as file:
        for value in initializers.values():
            if SHARES_BYTES not in value.meta:
                value.const_value = _store(value, file, path)
    for value in shared:
        source = initializers[value.meta[SHARES_BYTES]].const_value
        value.const_value = (
            _external(value, source.location, source.offset, source.length, path)
            if isinstance(source, ir.ExternalTensor)
            else ir.Tensor(value.const_value.numpy(), name=value.name)
        )
    ir.save(model, path)


def _store(value: ir.Value, file: BinaryIO, path: Path) -> ir.TensorProtocol:
    tensor = value.const_value
    if tensor.nbytes < _INLINE_BELOW:
        return ir.Tensor(tensor.numpy().copy(), name=value.name)
    alignment = _PAGE if tensor.nbytes >= _PAGED_FROM else _ALIGNMENT
    file.write(b"\0" * (-file.tell() % alignment))
    offset = file.tell()
    file.write(tensor.tobytes())
    return _external(value, Path(file.name).name, offset, file.tell() - offset, path)


def _external(value: ir.Value, location: str, offset: int, length: int, path: Path) -> ir.ExternalTensor:
    tensor = value.const_value
    return ir.ExternalTensor(
        location, offset, length, tensor.dtype, shape=tensor.shape, name=value.name, base_dir=path.parent
    )
