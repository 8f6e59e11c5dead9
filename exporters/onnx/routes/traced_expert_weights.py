"""The run's integers of mixtures of experts as the operands of their QMoE nodes.

Layout (ONNX Runtime's schema of QMoE): that of MatMulNBits for each expert, stacked along a first axis: codes uint8
[experts, N, K·bits/8], scales [experts, N, K/g], zero points uint8 [experts, N, ceil(K/g·bits/8)], lowest bits first.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray

from exporters.onnx.bindings import QUANTIZED_INPUTS, Binding, bits_attribute, quantized_initializers
from exporters.onnx.passes.graph_edit import cast_to_float, set_initializer
from exporters.onnx.routes.traced_mixtures import EXPERTS_OF, OPERATOR, Mixture
from exporters.onnx.run_weights import RunWeights

# Positions of the operator's other inputs (those of the codes: `QUANTIZED_INPUTS`). Between them are those of a third
# matrix, which it has no kernel for on CPUs.
_BIASES = {"fc1": 4, "fc2": 7}
_ROUTER_WEIGHTS = 14


def set_expert_weights(graph: ir.Graph, mixtures: list[Mixture], weights: RunWeights) -> list[Binding]:
    """Give every QMoE node of a traced graph its operands.

    Args:
        graph: edited in place.
        mixtures: those that the trace has nodes for.
        weights: the run.
    Returns:
        What the nodes hold: each expert's matrices, and the biases.
    """
    by_module = {mixture.module: mixture for mixture in mixtures}
    bindings: list[Binding] = []
    for old in [node for node in graph if node.op_type == OPERATOR]:
        mixture = by_module[old.attributes[EXPERTS_OF].as_string()]
        base = f"{mixture.module}.{OPERATOR}"
        hidden, chosen, router_weights = old.inputs
        inputs: list[ir.Value | None] = [hidden, chosen, *[None] * (_ROUTER_WEIGHTS - 2), router_weights]
        layout = weights.layout(mixture.parameters("fc1", 0))
        for part in _BIASES:
            for role, value in _operands(graph, f"{base}.{part}", mixture, part, weights).items():
                inputs[QUANTIZED_INPUTS[f"{OPERATOR}/{part}"][role]] = value
            if mixture.biased:
                inputs[_BIASES[part]] = _bias(graph, f"{base}.{part}.bias", mixture, part, weights)
        attributes = {name: a.value for name, a in old.attributes.items() if name != EXPERTS_OF}
        attributes |= {bits_attribute(OPERATOR): layout.bits, "block_size": layout.block_size}
        attributes["weights_prepacked"] = 0  # as they are here, whatever the provider likes best
        name = f"/{base.replace('.', '/')}"
        node = ir.node(OPERATOR, inputs, attributes, domain="com.microsoft", name=name, num_outputs=1)
        ir.convenience.replace_nodes_and_values(graph, old, [old], [node], old.outputs, node.outputs)
        bindings += _bindings(node, mixture)
    return bindings


def _operands(graph: ir.Graph, base: str, mixture: Mixture, part: str, weights: RunWeights) -> dict[str, ir.Value]:
    """Codes, scales (behind a Cast where they are stored in f16) and zero points of one matrix of all experts."""
    parameters, alternate = mixture.all_parameters(part), _alternate(part)
    layout = weights.layout(parameters)
    rows = layout.rows // mixture.experts

    def shape(of_rows: tuple[int, ...]) -> tuple[int, int, int]:
        return mixture.experts, rows, of_rows[-1]

    def read(role: str, shape: tuple[int, ...]) -> NDArray[Any]:
        operands = weights.operands(parameters, alternate=alternate)
        array: NDArray[Any] = {
            "qweight": operands.weight, "scales": operands.scales, "qzeros": operands.zero_points,
        }[role].reshape(shape)  # fmt: skip
        return array

    forms = {
        "qweight": ("uint8", shape(layout.gathered_shape)),
        "scales": (layout.scale_dtype, shape(layout.scales_shape)),
        "qzeros": ("uint8", shape(layout.zero_points_shape)),
    }
    codes, scales, zeros = (
        set_initializer(graph, f"{base}.{role}", dtype, size, partial(read, role, size))
        for role, (dtype, size) in forms.items()
    )
    read_as = cast_to_float(graph, scales) if layout.scale_dtype == "float16" else scales
    return {"weight": codes, "scales": read_as, "zero_points": zeros}


def _bias(graph: ir.Graph, name: str, mixture: Mixture, part: str, weights: RunWeights) -> ir.Value:
    """f32 [experts, N]."""
    binding = _bias_binding("", name, mixture, part)
    rows = weights.run.entry(weights.owner(binding.parameters[0])).shape[0] * _alternate(part)
    shape = (mixture.experts, rows)
    return set_initializer(graph, name, "float32", shape, lambda: weights.stored_floats(binding, "float32", shape))


def _bias_binding(node: str, initializer: str, mixture: Mixture, part: str) -> Binding:
    parameters = mixture.all_parameters(part, "bias")
    return Binding(node, OPERATOR, parameters, {"weight": initializer}, alternate=_alternate(part))


def _bindings(node: ir.Node, mixture: Mixture) -> list[Binding]:
    found = []
    for part, position in _BIASES.items():
        held = quantized_initializers(node, part)
        for expert in range(mixture.experts):
            parameters, name = mixture.parameters(part, expert), node.name or ""
            binding = Binding(name, OPERATOR, parameters, held, part=part, expert=expert, alternate=_alternate(part))
            found.append(binding)
        bias = node.inputs[position]
        if bias is not None:
            found.append(_bias_binding(node.name or "", bias.name or "", mixture, part))
    return found


def _alternate(part: str) -> int:
    """How many parameters give their rows by turns: gate and up do."""
    return 2 if part == "fc1" else 1
