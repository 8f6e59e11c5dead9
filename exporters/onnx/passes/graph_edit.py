"""Small edits that the passes share: initializers whose data is made when the file is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from exporters.onnx.bindings import Binding
from exporters.onnx.packing import OperandLayout
from exporters.onnx.run_weights import RunWeights

# Key in `ir.Value.meta`: the initializer whose bytes in the data file this one is another view of.
SHARES_BYTES = "signround_edge.shares_bytes"

_DTYPES = {"uint8": ir.DataType.UINT8, "float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16}


def set_initializer(
    graph: ir.Graph, name: str, dtype: str, shape: tuple[int, ...], make: Callable[[], NDArray[Any]]
) -> ir.Value:
    """Create the initializer of that name, or give the existing one new data.

    Args:
        graph: the graph to edit.
        name: the initializer's name.
        dtype: "uint8", "float32" or "float16".
        shape: its shape.
        make: returns the data, [*shape] in that dtype; called when the file is written, and then not kept.
    """
    onnx_type, onnx_shape = _DTYPES[dtype], ir.Shape(shape)

    def evaluate() -> ir.Tensor:
        array = make()
        assert (str(array.dtype), array.shape) == (dtype, shape), name
        return ir.Tensor(np.ascontiguousarray(array), name=name)

    tensor = ir.LazyTensor(evaluate, dtype=onnx_type, shape=onnx_shape, name=name)
    value: ir.Value | None = graph.initializers.get(name)
    if value is None:
        value = ir.Value(name=name, type=ir.TensorType(onnx_type), shape=onnx_shape, const_value=tensor)
        graph.register_initializer(value)
    else:
        value.type, value.shape, value.const_value = ir.TensorType(onnx_type), onnx_shape, tensor
    return value


def set_operand_initializers(graph: ir.Graph, base: str, binding: Binding, weights: RunWeights) -> list[ir.Value]:
    """Initializers `<base>.qweight`, `.scales` and `.qzeros` with the run's operands of a binding's rows.

    Returns:
        What a node is to read: scales in f16 go through a Cast, as ONNX Runtime wants them in the dtype of the
        activations. It folds that Cast when it loads the model, so scales are constants to its kernels all the same.
    """
    parameters, rows = binding.parameters, binding.rows
    layout = weights.layout(parameters, rows)
    # They are written one after the other, so `weights` packs each matrix once.
    codes = set_initializer(
        graph, f"{base}.qweight", "uint8", layout.weight_shape, lambda: weights.operands(parameters, rows).weight
    )
    scales = set_initializer(
        graph,
        f"{base}.scales",
        layout.scale_dtype,
        layout.scales_shape,
        lambda: weights.operands(parameters, rows).scales,
    )
    zeros = set_initializer(
        graph,
        f"{base}.qzeros",
        "uint8",
        layout.zero_points_shape,
        lambda: weights.operands(parameters, rows).zero_points,
    )
    return [codes, cast_to_float(graph, scales) if layout.scale_dtype == "float16" else scales, zeros]


def cast_to_float(graph: ir.Graph, value: ir.Value) -> ir.Value:
    """The output of a new Cast to f32 of an initializer, put before all other nodes."""
    cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT.value}, name=f"/{value.name}/Cast", num_outputs=1)
    output = cast.outputs[0]
    output.name, output.type, output.shape = (
        f"{value.name}/Cast/output_0",
        ir.TensorType(ir.DataType.FLOAT),
        value.shape,
    )
    graph.insert_before(next(iter(graph)), cast)
    return output


def set_gather_operands(
    graph: ir.Graph, base: str, binding: Binding, weights: RunWeights, shared: list[ir.Value]
) -> list[ir.Value]:
    """Codes uint8 [N, K·bits/8], scales and zero points of quantized parameters, as GatherBlockQuantized reads them.

    Args:
        graph: the graph to edit.
        base: where the names of new initializers start.
        binding: whose rows they are.
        weights: the run.
        shared: operands of a MatMulNBits of the same rows: the codes are another view of its bytes. Empty where
            there is none.
    """
    parameters, rows = binding.parameters, binding.rows
    shape = weights.layout(parameters, rows).gathered_shape
    _, scales, zeros = shared or set_operand_initializers(graph, base, binding, weights)

    def codes() -> NDArray[np.uint8]:
        return weights.operands(parameters, rows).weight.reshape(shape)

    value = set_initializer(graph, f"{base}.qweight", "uint8", shape, codes)
    if shared:
        value.meta[SHARES_BYTES] = shared[0].name
    return [value, scales, zeros]


def gather_attributes(layout: OperandLayout) -> dict[str, int]:
    """Attributes of a GatherBlockQuantized that takes rows of such operands."""
    return {"bits": layout.bits, "block_size": layout.block_size, "gather_axis": 0, "quantize_axis": 1}


def set_float_initializer(graph: ir.Graph, binding: Binding, dtype: str, weights: RunWeights) -> None:
    """Give the binding's weight initializer, which the graph has, the run's floats in "float32" or "float16"."""
    name = binding.initializers["weight"]
    shape = tuple(graph.initializers[name].shape.numpy())
    set_initializer(graph, name, dtype, shape, lambda: weights.stored_floats(binding, dtype, shape))
