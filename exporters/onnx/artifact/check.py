"""Comparing what a graph stores with the run directory, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from exporters.onnx.bindings import OPERAND_WORDS, Binding, bits_attribute, holds_columns_first
from exporters.onnx.qdq import OPERATOR, qdq_layout, qdq_operands
from exporters.onnx.run_weights import RunWeights
from signround_edge.errors import CheckFailed

_VALUES_AT_ONCE = 1 << 24


def check_bindings(graph: ir.Graph, bindings: list[Binding], weights: RunWeights) -> None:
    """CheckFailed, naming the parameters and the node, at the first stored value that is not the run's."""
    nodes = {node.name: node for node in graph}
    for binding in bindings:
        if binding.op == OPERATOR:
            _check_dequantized(graph, nodes[binding.node], binding, weights)
        elif binding.quantized:
            check_quantized(graph, nodes[binding.node], binding, weights)
        else:
            _check_floats(graph, binding, weights)
        _release(graph, binding)


def _check_dequantized(graph: ir.Graph, node: ir.Node, binding: Binding, weights: RunWeights) -> None:
    """The operands of one DequantizeLinear, and the attributes that say how they are read."""
    stored = graph.initializers[binding.initializers["weight"]]
    layout = qdq_layout(weights, binding, columns_first=holds_columns_first(node))
    attributes = {name: node.attributes[name].as_int() for name in node.attributes}
    if attributes != layout.attributes or stored.dtype != layout.dtype:
        raise CheckFailed(
            f"tensor {binding.title} is {stored.dtype} with {attributes} in node {node.name}, but {layout.dtype} with "
            f"{layout.attributes} in the run directory"
        )
    for role, expected in qdq_operands(weights, binding, layout).items():
        if role not in binding.initializers:
            raise CheckFailed(f"tensor {binding.title} has no {OPERAND_WORDS[role]} in node {node.name}")
        found = _array(graph, binding.initializers[role])
        _compare(binding, OPERAND_WORDS[role], found if role == "scales" else found.astype(expected.dtype), expected)


def _check_floats(graph: ir.Graph, binding: Binding, weights: RunWeights) -> None:
    stored = _array(graph, binding.initializers["weight"])
    _compare(binding, "weights", stored, weights.stored_floats(binding, str(stored.dtype), stored.shape))


def _release(graph: ir.Graph, binding: Binding) -> None:
    """Unmap the tensors' part of the data file, or what was read of a large one stays in memory until the end."""
    for initializer in binding.initializers.values():
        tensor = graph.initializers[initializer].const_value
        if isinstance(tensor, ir.ExternalTensor):
            tensor.release()


def check_complete(bindings: list[Binding], weights: RunWeights) -> list[str]:
    """CheckFailed when a parameter of the run is in no initializer.

    Returns the biases that the builder left out because all their values are 0; nothing else may be missing.
    """
    held = {weights.owner(p) for binding in bindings if not binding.rows for p in binding.parameters}
    held |= {weights.owner(p) for binding in bindings for p in binding.duplicates} | _held_in_parts(bindings, weights)
    missing = [name for name in weights.run.names() if name not in held]
    for name in missing:
        if not name.endswith(".bias") or bool(weights.run.dequantized(name).any()):
            raise CheckFailed(f"tensor {name} of the run directory is not in the ONNX graph")
    return missing


def _held_in_parts(bindings: list[Binding], weights: RunWeights) -> set[str]:
    """Parameters all of whose rows are in initializers that hold some rows each."""
    found: dict[str, set[int]] = {}
    for binding in bindings:
        start = 0
        for parameter in binding.parameters if binding.rows else ():
            owner = weights.owner(parameter)
            stop = start + weights.run.entry(owner).shape[0]
            for first, last in binding.rows:
                found.setdefault(owner, set()).update(range(max(first, start) - start, min(last, stop) - start))
            start = stop
    return {owner for owner, rows in found.items() if len(rows) == weights.run.entry(owner).shape[0]}


def check_quantized(graph: ir.Graph, node: ir.Node, binding: Binding, weights: RunWeights) -> None:
    """Check attributes, integers, zero points and scales of one quantized node; flat operands are accepted."""
    expected = weights.operands(binding.parameters, binding.rows, binding.alternate)
    bits, block_size = (node.attributes[name].as_int() for name in (bits_attribute(node.op_type), "block_size"))
    if (bits, block_size) != (expected.bits, expected.block_size):
        raise CheckFailed(
            f"tensor {binding.title} has {bits} bits in blocks of {block_size} in node "
            f"{node.name}, but {expected.bits} in blocks of {expected.block_size} in the run directory"
        )
    operands: dict[str, NDArray[Any]] = {
        "weight": expected.weight,
        "scales": expected.scales,
        "zero_points": expected.zero_points,
    }
    for role, array in operands.items():
        what = OPERAND_WORDS[role]
        if role not in binding.initializers:
            raise CheckFailed(f"tensor {binding.title} has no {what} in node {node.name}")
        stored = _array(graph, binding.initializers[role])
        stored = stored if binding.expert is None else stored[binding.expert]
        _compare(binding, what, stored.reshape(-1), array.reshape(-1))


def _array(graph: ir.Graph, initializer: str) -> NDArray[Any]:
    array: NDArray[Any] = graph.initializers[initializer].const_value.numpy()
    return array


def _compare(binding: Binding, what: str, stored: NDArray[Any], expected: NDArray[Any]) -> None:
    place = f"{what} of tensor {binding.title} in node {binding.node}"
    if stored.shape != expected.shape or stored.dtype != expected.dtype:
        raise CheckFailed(
            f"{place} are {stored.dtype} {list(stored.shape)}, expected {expected.dtype} {list(expected.shape)}"
        )
    differing = _count_differing(stored.reshape(-1), expected.reshape(-1))
    if differing:
        raise CheckFailed(f"{place} differ from the run directory in {differing} of {expected.size} values")


def _count_differing(stored: NDArray[Any], expected: NDArray[Any]) -> int:
    """By parts: the answers of a comparison take as much memory as an embedding of 8 bits."""
    starts = range(0, stored.size, _VALUES_AT_ONCE)
    return sum(
        int(np.count_nonzero(stored[i : i + _VALUES_AT_ONCE] != expected[i : i + _VALUES_AT_ONCE])) for i in starts
    )
