"""Mixtures of experts in a traced graph as one node a layer, com.microsoft.QMoE: it computes the chosen experts only.

The router stays what the model makes of it. The node gets its choice, ones and zeros of which it takes the k largest,
and the chosen experts' weights in its input `router_weights`, so any routing is expressed: softmax over all or over the
chosen, sigmoid, a bias for the choice, a factor. Source: the operator's schema in ONNX Runtime 1.31 (also
docs/ContribOperators.md); what its CPU kernel computes was measured (docs/LOG.md).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from exporters.onnx.packing import OperandLayout
from exporters.onnx.run_weights import RunWeights
from signround_edge.model.experts import Expert, Experts, ExpertsOfAllTokens

OPERATOR = "QMoE"
# Attribute of a node whose weights are not in yet: the module whose experts they are.
EXPERTS_OF = "signround_edge_experts"
# Eight bits are rounded (activations to int8 at every level), and so are two behind an activation.
EXACT_BITS = 4
_LARGE = 1e6  # beyond every limit of an activation


@dataclass(frozen=True)
class SwiGlu:
    """min(gate, limit)·sigmoid(alpha·min(gate, limit))·(clip(up, −limit, limit) + beta), the operator's activation."""

    alpha: float
    beta: float
    limit: float

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        """Of tensors of one shape."""
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return gate * torch.sigmoid(self.alpha * gate) * (up + self.beta)


@dataclass(frozen=True)
class Mixture:
    """The experts of one layer that become a node.

    Attributes:
        module: name of the module, as in the run's parameters.
        experts: how many.
        biased: they have biases.
        activation: what stands between gate, up and down.
    """

    module: str
    experts: int
    biased: bool
    activation: SwiGlu

    def parameters(self, part: str, expert: int, leaf: str = "weight") -> tuple[str, ...]:
        """Parameters of one expert's matrix (or "bias"): of "fc1" gate and up, whose rows alternate; of "fc2" down."""
        names = ("gate_proj", "up_proj") if part == "fc1" else ("down_proj",)
        return tuple(f"{self.module}.{expert}.{name}.{leaf}" for name in names)

    def all_parameters(self, part: str, leaf: str = "weight") -> tuple[str, ...]:
        """The same of all experts, one after the other."""
        return tuple(name for expert in range(self.experts) for name in self.parameters(part, expert, leaf))

    def held(self) -> frozenset[str]:
        """All parameters that the node has."""
        leaves = ("weight", "bias") if self.biased else ("weight",)
        return frozenset(name for part in ("fc1", "fc2") for leaf in leaves for name in self.all_parameters(part, leaf))


def mixture_of(module: str, experts: Experts, weights: RunWeights) -> Mixture | str:
    """What to make of the experts called `module`; or why they cannot be a node, for a line."""
    mixture = possible_mixture(module, experts, weights)
    if isinstance(mixture, str):
        return mixture
    parts = [mixture.all_parameters(part) for part in ("fc1", "fc2")]
    layouts = [{_form(weights.layout((name,))) for name in parameters} for parameters in parts]
    if any(len(forms) > 1 for forms in layouts):
        return "they differ in bits or block size"
    (bits, block), (down_bits, down_block) = (next(iter(forms)) for forms in layouts)
    if (bits, down_bits) != (EXACT_BITS, EXACT_BITS):
        return f"QMoE computes exactly with {EXACT_BITS} bits only, and they have {bits} and {down_bits}"
    if block != down_block:
        return f"QMoE has one block size, and theirs are {block} and {down_block}"
    return mixture


def possible_mixture(module: str, experts: Experts, weights: RunWeights) -> Mixture | str:
    """What `mixture_of` gives where the experts have one type of `EXACT_BITS`; they are quantized in this run."""
    first: Any = experts[0]
    if isinstance(experts, ExpertsOfAllTokens):
        return "their inputs are weighted, and QMoE weights outputs"
    activation = swiglu_of(first)
    if activation is None:
        return "QMoE on CPUs has no gate with their activation"
    mixture = Mixture(module, len(experts), first.up_proj.bias is not None, activation)
    if not all(weights.is_quantized(mixture.all_parameters(part)) for part in ("fc1", "fc2")):
        return "they are not all quantized"
    return mixture


def _form(layout: OperandLayout) -> tuple[int, int]:
    return layout.bits, layout.block_size


def swiglu_of(expert: Expert) -> SwiGlu | None:
    """The activation between an expert's matrices as QMoE's, read off what it computes; None: it is another one."""
    if not expert.gated:
        return None

    def at(gate: float, up: float) -> float:
        return float(expert.combine(*(torch.tensor([x], dtype=torch.float64) for x in (gate, up))))

    sigmoid = at(1, 1) - at(1, 0)
    if not 0 < sigmoid < 1:
        return None
    beta, limit = at(1, 0) / sigmoid, (at(1, _LARGE) - at(1, 0)) / sigmoid
    found = SwiGlu(
        round(math.log(sigmoid / (1 - sigmoid)), 6), round(beta, 6), round(limit, 6) if limit < _LARGE / 2 else math.inf
    )
    span = min(4 * found.limit, 40.0)
    grid = torch.linspace(-span, span, 81, dtype=torch.float64)
    gate, up = (values.flatten() for values in torch.meshgrid(grid, grid, indexing="ij"))
    return found if torch.allclose(found(gate, up), expert.combine(gate, up), rtol=1e-9, atol=1e-9) else None


@contextlib.contextmanager
def mixtures_as_nodes(model: nn.Module, mixtures: list[Mixture]) -> Iterator[None]:
    """Within, those experts are nodes without weights; what they give is only good for a trace."""
    kept: list[tuple[nn.Module, str, nn.Module]] = []
    try:
        for mixture in mixtures:
            owner, _, leaf = mixture.module.rpartition(".")
            parent = model.get_submodule(owner)
            kept.append((parent, leaf, model.get_submodule(mixture.module)))
            setattr(parent, leaf, _Node(mixture))
        yield
    finally:
        for parent, leaf, module in kept:
            setattr(parent, leaf, module)


class _Node(nn.Module):
    """The experts of a layer, as `Experts`, by one node."""

    def __init__(self, mixture: Mixture) -> None:
        super().__init__()
        self.mixture = mixture

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """f32 [tokens, hidden] as `Experts`."""
        numbers = torch.arange(self.mixture.experts)
        chosen = (top_k_index.unsqueeze(-1) == numbers).to(torch.float32)  # [tokens, k, experts]
        weights = (chosen * top_k_weights.to(torch.float32).unsqueeze(-1)).sum(dim=1)
        activation = self.mixture.activation
        attributes: dict[str, Any] = {
            "k": top_k_index.shape[-1],
            "activation_type": "swiglu",
            "swiglu_fusion": 1,  # rows of gate and up alternate; the CPU has no other form
            "activation_alpha": activation.alpha,
            "activation_beta": activation.beta,
            "normalize_routing_weights": 0,
            EXPERTS_OF: self.mixture.module,
        }
        if math.isfinite(activation.limit):
            attributes["swiglu_limit"] = activation.limit
        output: Tensor = torch.onnx.ops.symbolic(
            f"com.microsoft::{OPERATOR}",
            [hidden_states, chosen.sum(dim=1), weights],
            attributes,
            dtype=torch.float32,
            shape=hidden_states.shape,
            version=1,
        )
        return output
