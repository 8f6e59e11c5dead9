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
    # Its matrices are stacked by expert: FC1 is gate and up, whose rows alternate, FC2 is down.
    "QMoE/fc1": {"weight": 2, "scales": 3, "zero_points": 11},
    "QMoE/fc2": {"weight": 5, "scales": 6, "zero_points": 12},
}
# Matrices of one node, where it has several.
_PARTS = {"QMoE": ("fc1", "fc2")}
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
        part: which matrix of the node, where it has several: "fc1" or "fc2" of QMoE.
        expert: which of those that the initializers stack along their first axis; None where they hold one matrix.
        alternate: so many parameters in a row give their rows by turns (2: gate, up, gate, up); 1: one after the other.
    """

    node: str
    op: str
    parameters: tuple[str, ...]
    initializers: dict[str, str]
    transposed: bool = False
    duplicates: tuple[str, ...] = ()
    rows: Rows = ()
    function: str = ""
    part: str = ""
    expert: int | None = None
    alternate: int = 1

    @property
    def name(self) -> str:
        """The stored tensor's name: the node of a quantized one, the initializer of a float one."""
        if not self.quantized:
            return self.initializers["weight"]
        return self.node if self.expert is None else f"{self.node}/{self.part}/{self.expert}"

    @property
    def title(self) -> str:
        """Its parameters, as messages name them."""
        return " + ".join(self.parameters)

    @property
    def quantized(self) -> bool:
        """Whether the weight is stored as codes and scales."""
        return _key(self.op, self.part) in QUANTIZED_INPUTS

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
            **({"part": self.part} if self.part else {}),
            **({"expert": self.expert} if self.expert is not None else {}),
            **({"alternate": self.alternate} if self.alternate != 1 else {}),
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
            str(data.get("part", "")),
            data.get("expert"),
            int(data.get("alternate", 1)),
        )


def matrix_parts(node: ir.Node) -> tuple[str, ...]:
    """What `Binding.part` may be for this node; nothing for one that holds no codes."""
    return tuple(part for part in _PARTS.get(node.op_type, ("",)) if _key(node.op_type, part) in QUANTIZED_INPUTS)


def bits_attribute(op: str) -> str:
    """The attribute that says how many bits a code has."""
    return "expert_weight_bits" if op in _PARTS else "bits"


def quantized_initializers(node: ir.Node, part: str = "") -> dict[str, str]:
    """ "weight", "scales", "zero_points" → initializer name, for those that the node has; also behind a Cast."""
    found: dict[str, str] = {}
    for role, position in QUANTIZED_INPUTS[_key(node.op_type, part)].items():
        value = node.inputs[position] if position < len(node.inputs) else None
        if (cast := scales_cast(node, part)) is not None and role == "scales":
            value = cast.inputs[0]
        if value is not None and value.name and value.is_initializer():
            found[role] = value.name
    return found


def holds_columns_first(node: ir.Node) -> bool:
    """Whether a DequantizeLinear of ours holds [K, N]: its blocks are along axis 0, or its channels along axis 1."""
    axis = node.attributes.get("axis")
    return (1 if axis is None else axis.as_int()) == (0 if "block_size" in node.attributes else 1)


def scales_cast(node: ir.Node, part: str = "") -> ir.Node | None:
    """The Cast to f32 through which a quantized node reads f16 scales; None where it reads them as they are."""
    position = QUANTIZED_INPUTS[_key(node.op_type, part)]["scales"]
    value = node.inputs[position] if position < len(node.inputs) else None
    producer = None if value is None else value.producer()
    is_cast = producer is not None and producer.op_type == "Cast" and producer.attributes["to"].as_int() == _FLOAT
    return producer if is_cast else None


def _key(op: str, part: str) -> str:
    return f"{op}/{part}" if part else op
