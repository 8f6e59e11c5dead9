"""Reading an exported ONNX folder for `inspect` and `verify`. Every broken file ends in one UserError sentence.

Data stays in its file until a tensor is asked for. `read_tensors` also reads folders that others made; `iter_expected`
needs `signround_edge.json`.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from exporters.onnx.artifact.layouts import find_model, folder_of
from exporters.onnx.artifact.ort_format import read_ort_format
from exporters.onnx.artifact.sidecar import SIDECAR, Sidecar, hash_files
from exporters.onnx.bindings import (
    Binding,
    bits_attribute,
    holds_columns_first,
    matrix_parts,
    quantized_initializers,
)
from signround_edge.errors import UserError, first_line

if TYPE_CHECKING:  # they load torch, which a runtime's worker process can do without
    from exporters.onnx.run_weights import RunWeights
    from signround_edge.run_directory import RunDirectory

FloatArray = NDArray[np.float32]

_MODEL = "model.onnx"
_TYPE_NAMES = {"FLOAT": "F32", "FLOAT16": "F16", "BFLOAT16": "BF16", "DOUBLE": "F64"}
_TYPE_NAMES |= {"UINT8": "U8", "INT8": "I8", "INT32": "I32", "INT64": "I64", "BOOL": "BOOL"}


@dataclass(frozen=True)
class Artifact:
    """An ONNX model whose file has been parsed and whose external data is known to be there.

    Attributes:
        path: the .onnx or .ort file.
        graph: its graph; initializers are read from the data file on demand.
    """

    path: Path
    graph: ir.Graph

    def quantized_nodes(self) -> list[ir.Node]:
        """MatMulNBits, GatherBlockQuantized, QMoE and DequantizeLinear nodes whose codes are stored here, in order.

        DequantizeLinear counts in front of matrices; in other people's graphs it stands in many places.
        """
        return list(dict.fromkeys(node for node, _ in self.quantized_parts()))

    def quantized_parts(self) -> list[tuple[ir.Node, str]]:
        """The same nodes, each as often as it has matrices, with the part that `Binding` names."""
        parts = [(n, p) for n in self.graph for p in matrix_parts(n) if "weight" in quantized_initializers(n, p)]
        return [(n, p) for n, p in parts if n.op_type != "DequantizeLinear" or self._dequantizes_a_matrix(n)]

    def _dequantizes_a_matrix(self, node: ir.Node) -> bool:
        stored = self.graph.initializers[quantized_initializers(node)["weight"]].const_value
        return len(stored.shape) == 2 and stored.dtype.bitwidth <= 8

    def form(self, node: ir.Node, part: str = "") -> tuple[int, int, tuple[int, ...]]:
        """(bits, block size, [N, K], or [experts, N, K]) of a quantized node's matrix.

        UserError when its attributes are no positive integers.
        """
        stored = self.graph.initializers[quantized_initializers(node, part)["weight"]].const_value
        shape = tuple(stored.shape.numpy())
        if node.op_type != "DequantizeLinear":
            bits = self.attribute(node, bits_attribute(node.op_type))
            leading = shape[:2] if part else shape[:1]
            cols = int(np.prod(shape)) * 8 // bits // max(int(np.prod(leading)), 1)
            if part and "block_size" not in node.attributes:  # one scale a row
                return bits, cols, (*leading, cols)
            return bits, self.attribute(node, "block_size"), (*leading, cols)
        rows_first = shape if not holds_columns_first(node) else shape[::-1]
        blocks = "block_size" in node.attributes
        return stored.dtype.bitwidth, self.attribute(node, "block_size") if blocks else rows_first[1], rows_first

    def attribute(self, node: ir.Node, name: str) -> int:
        """The node's bits, "block_size" or "K"; UserError when it is no positive integer."""
        attribute = node.attributes.get(name)
        if attribute is None:  # the operators' own defaults (ONNX Runtime, docs/ContribOperators.md)
            return {"bits": 4, "expert_weight_bits": 4, "block_size": 128}[name]
        value = attribute.value if attribute.type == ir.AttributeType.INT else None
        if not isinstance(value, int) or value <= 0:
            raise UserError(f"{self.path}: node {node.name} has {name} {value}; export the run again")
        return value

    def array(self, initializer: str) -> NDArray[Any]:
        """The stored array of an initializer; UserError when the graph has none of that name."""
        value = self.graph.initializers.get(initializer)
        if value is None or value.const_value is None:
            raise UserError(
                f"{self.path} has no initializer {initializer}, which {SIDECAR} names; export the run again"
            )
        try:
            array: NDArray[Any] = value.const_value.numpy()
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self.path}: tensor {initializer} cannot be read ({error}); export the run again"
            ) from error
        return array


def resolve(path: Path) -> Path:
    """The .onnx file of an artifact given as a folder or as the file; UserError when there is none."""
    if path.is_dir():
        files = find_model(path)
        if (path / _MODEL) in files:
            return path / _MODEL
        if len(files) == 1:
            return files[0]
        raise UserError(f"{path} holds {len(files)} .onnx files and no {_MODEL}; give the .onnx file itself")
    if not path.is_file():
        raise UserError(f"{path} does not exist; give an exported folder or its .onnx file")
    return path


def open_artifact(path: Path) -> Artifact:
    """Parse the model and check that all its data is in place; UserError on a broken, truncated or missing file."""
    return Artifact(resolve(path), open_model(path).graph)


def open_model(path: Path, remedy: str = "export the run again") -> ir.Model:
    """The same, as the whole model; `remedy` is the way out that errors name."""
    file = resolve(path)
    try:
        return _parse(file, remedy)
    except UserError:
        raise
    except Exception as error:  # protobuf and onnx_ir raise many types on bytes that are no model
        raise UserError(f"{file} is not a readable ONNX file ({first_line(error)[:200]}); {remedy}") from error


def read_tensors(path: Path) -> list[tuple[str, str, tuple[int, ...], int]]:
    """(name, type, shape, bytes) of every stored tensor, for `inspect`.

    A quantized matrix is one tensor, named by its node, of type "MatMulNBits-<bits>x<block size>" and shape [N, K];
    its bytes are codes, scales and zero points. Those of a mixture of experts are of type "QMoE-…", [experts, N, K].
    Others carry their initializer's name, a type such as "F32" and the
    shape of the Hugging Face parameter where `signround_edge.json` says that they are stored transposed. Bytes that two
    tensors share (a tied embedding and head) are counted at the first of them, so that the sum is true.
    """
    artifact = open_artifact(path)
    initializers = artifact.graph.initializers
    counted: set[Any] = set()
    rows: list[tuple[str, str, tuple[int, ...], int]] = []
    inside: set[str] = set()
    for node, part in artifact.quantized_parts():
        operands = quantized_initializers(node, part)
        inside.update(operands.values())
        bits, block_size, shape = artifact.form(node, part)
        size = sum(_bytes_once(initializers[name], counted) for name in operands.values())
        title = f"{node.name}/{part}" if part else str(node.name or "")
        rows.append((title, f"{node.op_type}-{bits}x{block_size}", shape, size))
    transposed: set[str] = set()
    if has_sidecar(artifact.path):
        transposed = {b.name for b in read_sidecar(path).bindings if b.transposed}
    for name, value in initializers.items():
        if name not in inside:
            shape = tuple(value.const_value.shape.numpy())
            shape = shape[::-1] if name in transposed else shape
            rows.append((name, _type_name(value.const_value.dtype), shape, _bytes_once(value, counted)))
    return rows


def read_sidecar(path: Path) -> Sidecar:
    """`signround_edge.json` beside the model; UserError when there is none or it is not readable."""
    return Sidecar.read(folder_of(resolve(path)))


def has_sidecar(model: Path) -> bool:
    """Whether an .onnx or .ort file belongs to an export of ours."""
    return (folder_of(model) / SIDECAR).is_file()


def changed_files(path: Path) -> list[str]:
    """Names of files whose sha256 is not the one recorded at export, or that are missing."""
    file = resolve(path)
    found = hash_files(folder_of(file))
    return [name for name, digest in read_sidecar(path).files.items() if found.get(name) != digest]


def iter_expected(run: RunDirectory, path: Path) -> Iterator[tuple[str, tuple[str, ...], Callable[[], FloatArray]]]:
    """What the artifact must hold: (stored tensor's name, Hugging Face names, function that returns the weights).

    The weights are f32 in the artifact's own order and orientation: [N, K] with the rows of a packed QKV projection
    stacked for quantized tensors, as stored for float ones (a MatMul's are [K, N]); f16 tensors are rounded to f16.

    Raises:
        UserError: no or a broken `signround_edge.json`, or the run is of another model.
        CheckFailed: the artifact lacks a parameter of the run.
    """
    from exporters.onnx.artifact.check import check_complete
    from exporters.onnx.run_weights import RunWeights

    artifact, sidecar, weights = open_artifact(path), read_sidecar(path), RunWeights(run)
    check_complete(sidecar.bindings, weights)
    for binding in sidecar.bindings:
        yield binding.name, binding.parameters, _expected(artifact, binding, weights)


def stored_floats(artifact: Artifact) -> Iterator[tuple[str, FloatArray]]:
    """(name, f32 array as stored) of every float tensor that holds a parameter, one at a time."""
    for binding in read_sidecar(artifact.path).bindings:
        if not binding.quantized:
            yield binding.name, artifact.array(binding.initializers["weight"]).astype(np.float32)


def _expected(artifact: Artifact, binding: Binding, weights: RunWeights) -> Callable[[], FloatArray]:
    def read() -> FloatArray:
        if binding.quantized:
            return weights.rows(binding)
        stored = artifact.array(binding.initializers["weight"])
        return weights.stored_floats(binding, str(stored.dtype), stored.shape).astype(np.float32)

    return read


def _parse(file: Path, remedy: str) -> ir.Model:
    """The model, complete: every value that a node reads comes from somewhere, and all external data is there."""
    log = logging.getLogger("onnx_ir")  # what it would warn of ends in an error below
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = read_ort_format(file) if file.suffix == ".ort" else ir.load(file)
    finally:
        log.setLevel(level)
    graph = model.graph
    if not list(graph):
        raise UserError(f"{file} is not an ONNX model (its graph is empty); {remedy}")
    for name, value in graph.initializers.items():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            _check_external(file, name, tensor, int(tensor.nbytes), remedy)
    known = set(graph.inputs)
    for node in graph:
        for value in node.inputs:
            if value is not None and value.producer() is None and not value.is_initializer() and value not in known:
                raise UserError(f"{file}: node {node.name} reads {value.name}, which nothing gives; {remedy}")
    return model


def _check_external(file: Path, name: str, tensor: ir.ExternalTensor, nbytes: int, remedy: str) -> None:
    location = Path(tensor.location)
    if location.is_absolute() or ".." in location.parts:
        raise UserError(f"{file}: tensor {name} points outside the folder ({location}); do not trust this file")
    data = file.parent / location
    if not data.is_file():
        raise UserError(f"{data} is missing, but {file.name} keeps tensor {name} there; restore it, or {remedy}")
    if (tensor.length or nbytes) != nbytes or (tensor.offset or 0) + nbytes > data.stat().st_size:
        raise UserError(f"{data} is truncated: tensor {name} ends behind its end; restore it, or {remedy}")


def _bytes_once(value: ir.Value, counted: set[Any]) -> int:
    tensor = value.const_value
    external = isinstance(tensor, ir.ExternalTensor)
    place = (str(tensor.location), tensor.offset) if external else value.name
    if place in counted:
        return 0
    counted.add(place)
    return int(tensor.nbytes)


def _type_name(dtype: ir.DataType) -> str:
    return _TYPE_NAMES.get(str(dtype.name), str(dtype.name))
