"""Bindings: which node and initializers of a graph hold which Hugging Face parameters.

They are found by value (`routes.recognition`, `routes.matching`), and kept in `signround_edge.json`: all that reads an
exported folder takes them from there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

# Positions of the stored operands among a node's inputs (ONNX Runtime, docs/ContribOperators.md).
QUANTIZED_INPUTS = {
    "MatMulNBits": {"weight": 1, "scales": 2, "zero_points": 3},
    "GatherBlockQuantized": {"weight": 0, "scales": 2, "zero_points": 3},
    "DequantizeLinear": {"weight": 0, "scales": 1, "zero_points": 2},
}
# What messages call them.
OPERAND_WORDS = {"weight": "codes", "scales": "scales", "zero_points": "zero points"}

_FLOAT = ir.DataType.FLOAT.value

# Ranges (first row, row behind the last) of stacked parameters, in the order in which they are stored; () for all rows.
Rows = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Binding:
    """Where a graph holds the rows of one or more parameters.

    Attributes:
        node: name of the node that reads them.
        op: its operator type.
        parameters: Hugging Face names, their rows stacked in this order (a packed QKV projection has three).
        initializers: "weight", and for quantized operators "scales" and "zero_points" → initializer name.
        transposed: the weight is the transpose of the Hugging Face parameter (a float MatMul wants [K, N] of a Linear).
        duplicates: parameters with the values of the only one in `parameters`, which the graph keeps once.
        rows: which of the stacked rows, and in which order; () for all as they are.
        function: what is stored of each value, a key of `functions.FUNCTIONS`.
    """

    node: str
    op: str
    parameters: tuple[str, ...]
    initializers: dict[str, str]
    transposed: bool = False
    duplicates: tuple[str, ...] = ()
    rows: Rows = ()
    function: str = ""

    @property
    def name(self) -> str:
        """The stored tensor's name: the node of a quantized one, the initializer of a float one."""
        return self.node if self.quantized else self.initializers["weight"]

    @property
    def title(self) -> str:
        """Its parameters, as messages name them."""
        return " + ".join(self.parameters)

    @property
    def quantized(self) -> bool:
        """Whether the weight is stored as codes and scales."""
        return self.op in QUANTIZED_INPUTS

    def to_json(self) -> dict[str, Any]:
        """The entry of `signround_edge.json`."""
        return {
            "name": self.name,
            "node": self.node,
            "op": self.op,
            "parameters": list(self.parameters),
            "initializers": self.initializers,
            "transposed": self.transposed,
            **({"duplicates": list(self.duplicates)} if self.duplicates else {}),
            **({"rows": [list(part) for part in self.rows]} if self.rows else {}),
            **({"function": self.function} if self.function else {}),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Binding:
        """Raises KeyError or TypeError on anything else than `to_json` writes."""
        return cls(
            data["node"],
            data["op"],
            tuple(data["parameters"]),
            dict(data["initializers"]),
            data["transposed"],
            tuple(data.get("duplicates", ())),
            tuple((int(start), int(stop)) for start, stop in data.get("rows", ())),
            str(data.get("function", "")),
        )


def quantized_initializers(node: ir.Node) -> dict[str, str]:
    """ "weight", "scales", "zero_points" → initializer name, for those that the node has; also behind a Cast."""
    found: dict[str, str] = {}
    for role, position in QUANTIZED_INPUTS[node.op_type].items():
        value = node.inputs[position] if position < len(node.inputs) else None
        if (cast := scales_cast(node)) is not None and role == "scales":
            value = cast.inputs[0]
        if value is not None and value.name and value.is_initializer():
            found[role] = value.name
    return found


def holds_columns_first(node: ir.Node) -> bool:
    """Whether a DequantizeLinear of ours holds [K, N]: its blocks are along axis 0, or its channels along axis 1."""
    axis = node.attributes.get("axis")
    return (1 if axis is None else axis.as_int()) == (0 if "block_size" in node.attributes else 1)


def scales_cast(node: ir.Node) -> ir.Node | None:
    """The Cast to f32 through which a quantized node reads f16 scales; None where it reads them as they are."""
    position = QUANTIZED_INPUTS[node.op_type]["scales"]
    value = node.inputs[position] if position < len(node.inputs) else None
    producer = None if value is None else value.producer()
    is_cast = producer is not None and producer.op_type == "Cast" and producer.attributes["to"].as_int() == _FLOAT
    return producer if is_cast else None
