"""GatherBlockQuantized by standard operators, as a function in the model, for runtimes that have no kernel of it.

The WebAssembly build of ONNX Runtime in transformers.js 4.3.2 (onnxruntime-web 1.31.0-dev.20260914, "asyncify") knows
the operator on WebGPU only. The function has its name, inputs and attributes, so that what reads a graph finds the same
operands; runtimes put its nodes in its place when they load the model.

(codes − zero points)·scales of the rows that the tokens name, in the scales' type: the difference is exact, so the rows
are those of the operator bit for bit.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

DOMAIN = "signround_edge"
_OPERATOR, _OPSET = "GatherBlockQuantized", 18


def use_portable_gathers(model: ir.Model) -> None:
    """Let every GatherBlockQuantized of the graph be the function; operands stay as they are."""
    for node in model.graph:
        if node.op_type != _OPERATOR:
            continue
        bits, block_size = (node.attributes[name].as_int() for name in ("bits", "block_size"))
        scales = node.inputs[2]
        assert scales is not None
        assert scales.shape is not None
        blocks = int(scales.shape[1])
        dtype = scales.dtype or ir.DataType.FLOAT
        node.domain, node.overload = DOMAIN, f"{bits}_bits_{blocks}_blocks_of_{block_size}_{dtype.name.lower()}"
        function = _function(bits, block_size, blocks, dtype, node.overload)
        model.functions.setdefault(function.identifier(), function)
        model.opset_imports[DOMAIN] = 1
        model.ir_version = max(model.ir_version or 0, 10)  # which has overloads


def _function(bits: int, block_size: int, blocks: int, dtype: ir.DataType, overload: str) -> ir.Function:
    """codes uint8 [N, blocks·g·bits/8], tokens [batch, tokens], scales [N, blocks], zero points uint8 → rows."""
    body = _Body(dtype)
    codes, tokens, scales, zeros = inputs = [ir.Value(name=name) for name in ("codes", "tokens", "scales", "zeros")]
    found = body.unpacked(body.add("Gather", codes, tokens), bits, blocks * block_size)
    values = body.add("Reshape", found, body.constant([0, 0, blocks, block_size]))
    last = body.constant([-1])
    shift = body.add("Unsqueeze", body.unpacked(body.add("Gather", zeros, tokens), bits, blocks), last)
    scale = body.add("Unsqueeze", body.add("Gather", scales, tokens), last)
    weights = body.add("Mul", body.add("Sub", values, shift), scale)
    rows = body.add("Reshape", weights, body.constant([0, 0, blocks * block_size]))
    graph = ir.Graph(inputs, [rows], nodes=body.nodes, opset_imports={"": _OPSET}, name=_OPERATOR)
    names = ("bits", "block_size", "gather_axis", "quantize_axis")
    attributes = [ir.Attr(name, ir.AttributeType.INT, None) for name in names]
    return ir.Function(DOMAIN, _OPERATOR, overload, graph=graph, attributes=attributes)


class _Body:
    """Nodes of a function, in order; it computes in `dtype`, which holds the differences of codes exactly."""

    def __init__(self, dtype: ir.DataType) -> None:
        self.nodes: list[ir.Node] = []
        self.dtype = dtype

    def add(self, op: str, *inputs: ir.Value, **attributes: int | str) -> ir.Value:
        """The output of a new node."""
        node = ir.node(op, list(inputs), attributes, num_outputs=1, name=f"{op}_{len(self.nodes)}")
        node.outputs[0].name = f"{op}_{len(self.nodes)}_output"
        self.nodes.append(node)
        return node.outputs[0]

    def constant(self, values: list[int], dtype: type = np.int64) -> ir.Value:
        """A vector."""
        return self.add("Constant", value=ir.tensor(np.array(values, dtype=dtype)))  # type: ignore[arg-type]

    def unpacked(self, packed: ir.Value, bits: int, count: int) -> ir.Value:
        """[batch, tokens, count] of values that lie in bytes, the lowest bits first."""
        if bits < 8:
            per_byte = 8 // bits
            shifts = self.constant([i * bits for i in range(per_byte)], np.uint8)
            bytes_ = self.add("Unsqueeze", packed, self.constant([-1]))
            shifted = self.add("BitShift", bytes_, shifts, direction="RIGHT")
            each = self.add("BitwiseAnd", shifted, self.constant([(1 << bits) - 1], np.uint8))
            padded = math.ceil(count / per_byte) * per_byte
            packed = self.add("Reshape", each, self.constant([0, 0, padded]))
            if padded > count:
                ends = [self.constant([0]), self.constant([count]), self.constant([-1])]
                packed = self.add("Slice", packed, *ends)
        return self.add("Cast", packed, to=self.dtype.value)
