"""ONNX Runtime's own file format: model.ort, for builds of the runtime that hold only the operators that a model needs.

Source of the format: onnxruntime/core/flatbuffers/schema/ort.fbs, whose Python classes the package onnxruntime brings.
The file is what ONNX Runtime itself saves after its basic optimizations, which fold constants (scales in f16 become
f32) and change no node of ours. Nothing is folded where that would replace a parameter of the model by what a traced
graph computes of it (the filter of a convolution in another shape). Codes that embedding and head share are in it
twice: a tensor has one shape there.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from exporters.onnx.third_party_logging import logging_restored
from signround_edge.errors import UserError

ORT_FILE = "model.ort"
OPERATORS_FILE = "model.required_operators.config"
_IDENTIFIER = b"ORTM"  # at byte 4, as in every FlatBuffers file
_MOST_BYTES = 2_000_000_000  # FlatBuffers count in signed 32 bits
_INT = 2  # AttributeType.INT


def write_ort_format(model: Path, floats: Collection[str] = ()) -> None:
    """Write `model.ort` and the list of operators and types that it needs beside model.onnx.

    The list is what `build.py --include_ops_by_config` of ONNX Runtime reads.

    Args:
        model: model.onnx.
        floats: initializers that hold parameters as floats, which the file keeps by name.
    Raises:
        UserError: the model is too large for the format, or ONNX Runtime replaces one of `floats`.
    """
    size = sum(file.stat().st_size for file in model.parent.glob("model.onnx*"))
    if size > _MOST_BYTES:
        raise UserError(
            f"--ort-format: the model has {size:,} bytes, and an .ort file holds less than 2 GB; export without it"
        )
    out = model.with_name(ORT_FILE)
    for without in ([], ["ConstantFolding"]):
        _convert(model, out, without)
        kept = read_ort_format(out).graph.initializers
        replaced = next((name for name in floats if name not in kept), None)
        if replaced is None:
            break
    else:
        raise UserError(
            f"--ort-format: ONNX Runtime puts something else in the place of tensor {replaced}, so that the file could "
            "not be compared with the run; export without it"
        )
    operators = model.with_name(OPERATORS_FILE)
    with _contained():
        from onnxruntime.tools.ort_format_model import create_config_from_models

        create_config_from_models([out], operators, True)
    lines = operators.read_text(encoding="utf-8").splitlines(keepends=True)
    operators.write_text("".join(f"# - {ORT_FILE}\n" if line.startswith("# - ") else line for line in lines))


def _convert(model: Path, out: Path, without: list[str]) -> None:
    """Let ONNX Runtime write it, without some of its optimizers."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(out)
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.add_session_config_entry("session.save_model_format", "ORT")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(
        str(model), options, providers=["CPUExecutionProvider"], disabled_optimizers=without or None
    )


def read_ort_format(file: Path) -> ir.Model:
    """The graph of an .ort file: nodes with their integer attributes, and initializers that stay in the mapped file.

    Raises:
        UserError: it is no .ort file. Other exceptions where it is damaged.
    """
    data = np.memmap(file, dtype=np.uint8, mode="r") if file.stat().st_size else np.zeros(0, dtype=np.uint8)
    graph = _root(data, str(file))
    values: dict[str, ir.Value] = {}

    def value(name: bytes) -> ir.Value | None:
        return values.setdefault(name.decode(), ir.Value(name=name.decode())) if name else None

    initializers = []
    for i in range(graph.InitializersLength()):
        tensor = graph.Initializers(i)
        array = _array(tensor)
        held = value(tensor.Name())
        assert held is not None
        held.const_value = ir.Tensor(array, name=held.name)
        held.type, held.shape = ir.TensorType(held.const_value.dtype), held.const_value.shape
        initializers.append(held)
    nodes = []
    for i in range(graph.NodesLength()):
        node = graph.Nodes(i)
        attributes = {a.Name().decode(): a.I() for a in _attributes(node) if a.Type() == _INT}
        nodes.append(
            ir.node(
                node.OpType().decode(),
                [value(node.Inputs(k)) for k in range(node.InputsLength())],
                attributes,
                domain=(node.Domain() or b"").decode(),
                outputs=[value(node.Outputs(k)) or ir.Value() for k in range(node.OutputsLength())],
                name=node.Name().decode(),
            )
        )
    inputs, outputs = (
        [values[name(k).decode()] for k in range(count()) if name(k).decode() in values]
        for name, count in ((graph.Inputs, graph.InputsLength), (graph.Outputs, graph.OutputsLength))
    )
    return ir.Model(ir.Graph(inputs, outputs, nodes=nodes, initializers=initializers), ir_version=10)


def _root(data: Any, name: str) -> Any:
    with _contained():
        from onnxruntime.tools import ort_format_model  # noqa: F401 (makes ort_flatbuffers_py known)
        from ort_flatbuffers_py.fbs.InferenceSession import InferenceSession
    if bytes(data[4:8]) != _IDENTIFIER:
        raise UserError(f"{name} is no .ort file of ONNX Runtime; export the run again")
    return InferenceSession.GetRootAsInferenceSession(data, 0).Model().Graph()


def _attributes(node: Any) -> Iterator[Any]:
    return (node.Attributes(i) for i in range(node.AttributesLength()))


def _array(tensor: Any) -> Any:
    dtype = ir.DataType(tensor.DataType()).numpy()
    shape = [tensor.Dims(i) for i in range(tensor.DimsLength())]
    if tensor.RawDataLength() == 0:
        return np.zeros(shape, dtype=dtype)
    return tensor.RawDataAsNumpy().view(dtype).reshape(shape)


@contextlib.contextmanager
def _contained() -> Iterator[None]:
    """Importing ONNX Runtime's tools configures the root logger; they log what they do."""
    paths = list(sys.path)
    try:
        with logging_restored("ort_format_model.utils"):
            yield
    finally:
        sys.path[:] = [*paths, *(p for p in sys.path if p not in paths and p.endswith("ort_format_model"))]
