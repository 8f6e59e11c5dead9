"""Where the files of an exported folder lie: as onnxruntime-genai wants them, or as transformers.js does.

transformers.js (read in @huggingface/transformers 4.3.2: src/utils/dtypes.js, model-loader.js, hub/constants.js) loads
`onnx/model<suffix>.onnx`, whose suffix follows from the data type, and data files `<that name>_data`, `…_data_1` and so
on, as many as config.json says. Everything else lies beside the folder `onnx`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from exporters.onnx.artifact.sidecar import SIDECAR
from exporters.onnx.options import GENAI

MODEL_FOLDER = "onnx"  # of transformers.js

# Bits of most weights of decoder blocks → transformers.js's name, which only chooses the file; a graph computes with
# what it holds.
_NAMES = {2: "q2", 4: "q4", 8: "q8"}
_SUFFIXES = {"q2": "_q2", "q4": "_q4", "q8": "_quantized", "fp32": "", "q2f16": "_q2f16", "q4f16": "_q4f16"}
_SUFFIXES |= {"fp16": "_fp16"}  # it has no name for 8 bits in f16


@dataclass(frozen=True)
class Layout:
    """Names of an export's model.

    Attributes:
        model: the .onnx file within the folder.
        data: what stands between its name and the number of a data file.
        dtype: what transformers.js calls it; None in the other layout.
    """

    model: Path
    data: str
    dtype: str | None = None


def layout_of(name: str, graph: ir.Graph) -> Layout:
    """The layout of that name for a finished graph."""
    if name == GENAI:
        return Layout(Path("model.onnx"), ".data")
    dtype = _dtype(graph)
    if any(value.dtype == ir.DataType.FLOAT16 for value in graph.outputs):
        dtype = {"fp32": "fp16", "q8": "fp16"}.get(dtype, f"{dtype}f16")
    return Layout(Path(MODEL_FOLDER) / f"model{_SUFFIXES[dtype]}.onnx", "_data", dtype)


def find_model(folder: Path) -> list[Path]:
    """The .onnx files of a folder in either layout, sorted."""
    return sorted(folder.glob("*.onnx")) or sorted((folder / MODEL_FOLDER).glob("*.onnx"))


def folder_of(model: Path) -> Path:
    """The exported folder to which an .onnx or .ort file belongs."""
    parent = model.parent
    return parent.parent if parent.name == MODEL_FOLDER and not (parent / SIDECAR).is_file() else parent


def _dtype(graph: ir.Graph) -> str:
    """By the decoder blocks: a head of 8 bits holds most weights of a small model."""
    weights: Counter[int] = Counter()
    head = _head(graph)
    for node in graph:
        if node.op_type == "MatMulNBits" and node is not head:
            bits = node.attributes["bits"].as_int()
            weights[bits] += node.attributes["N"].as_int() * node.attributes["K"].as_int()
    return _NAMES[weights.most_common(1)[0][0]] if weights else "fp32"


def _head(graph: ir.Graph) -> ir.Node | None:
    """The product nearest before the logits; None where floats are multiplied there."""
    before = [value.producer() for value in graph.outputs if value.name == "logits"]
    for node in before:  # grows
        if node is not None and node.op_type in ("MatMulNBits", "MatMul", "Gemm"):
            return node if node.op_type == "MatMulNBits" else None
        before += [value.producer() for value in node.inputs if value is not None] if node is not None else []
    return None
