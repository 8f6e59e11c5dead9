"""Another accuracy level for an .ort file, whose graph cannot be edited as an ONNX file's can.

The Python classes of the format come with the package onnxruntime (onnxruntime/core/flatbuffers/schema/ort.fbs), in a
folder that only its tools know.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from signround_edge.errors import UserError

_IDENTIFIER = b"ORTM"  # at byte 4, as in every FlatBuffers file
# Attribute.i in its table's list of fields (name, doc_string, type, f, i, …): 4 bytes, then 2 for each field before it.
_OFFSET_OF_I = 12


def with_accuracy_level(file: Path, level: int) -> bytes:
    """An .ort file's bytes with another accuracy_level on every MatMulNBits and QMoE: one integer in place for each.

    Raises:
        UserError: it is no .ort file, or its nodes hold no level that could be changed. Other exceptions where it is
            damaged.
    """
    data = bytearray(file.read_bytes())
    if data[4:8] != _IDENTIFIER:
        raise UserError(f"{file} is no .ort file of ONNX Runtime; export the run again")
    graph = _session_class().GetRootAsInferenceSession(np.frombuffer(data, dtype=np.uint8), 0).Model().Graph()
    for node in (graph.Nodes(i) for i in range(graph.NodesLength())):
        if node.OpType() not in (b"MatMulNBits", b"QMoE"):
            continue
        for attribute in (node.Attributes(i) for i in range(node.AttributesLength())):
            if attribute.Name() == b"accuracy_level" and attribute.I() != level:
                offset = attribute._tab.Offset(_OFFSET_OF_I)
                if offset == 0:
                    raise UserError(f"an .ort file of accuracy level 0 cannot be run at level {level}; use model.onnx")
                place = attribute._tab.Pos + offset
                data[place : place + 8] = level.to_bytes(8, "little", signed=True)
    return bytes(data)


def _session_class() -> Any:
    """InferenceSession of the format, without importing ONNX Runtime's tools: they load torch where there is one."""
    import onnxruntime

    folder = str(Path(onnxruntime.__file__).parent / "tools" / "ort_format_model")
    if folder not in sys.path:
        sys.path.append(folder)
    from ort_flatbuffers_py.fbs.InferenceSession import InferenceSession

    return InferenceSession
