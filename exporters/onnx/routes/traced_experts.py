"""Mixtures of experts in a traced graph: one node a layer where there is one that computes what the experts compute.

Else every expert computes for every token, and what was not chosen counts zero: which rows an expert multiplies depends
on data, and no trace holds that. With each expert as three matrices of its own (`signround_edge.model.experts`) they
become MatMulNBits like all others, at the price of computing them all.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from exporters.onnx.routes.traced_mixtures import Mixture, mixture_of, possible_mixture
from exporters.onnx.run_weights import RunWeights
from signround_edge.model.decoder import set_tensor, transformers_model
from signround_edge.model.experts import Experts, ExpertsOfAllTokens, replace_experts


class _EveryExpert(Experts):
    """Experts with no choice of rows: the sum over all of them, each weighted by what the router gave it."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """f32 [tokens, hidden] as `Experts`."""
        result = torch.zeros_like(hidden_states)
        for number, expert in enumerate(self):
            chosen = (top_k_index == number).to(top_k_weights.dtype)
            weight = (top_k_weights * chosen).sum(dim=-1, keepdim=True)
            result = result + expert(hidden_states, top_k_index) * weight
        return result


class _EveryExpertOfAllTokens(ExpertsOfAllTokens):
    """The same for those that are given weighted inputs: zeros give zeros."""

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        """f32 [experts · tokens, hidden] as `ExpertsOfAllTokens`."""
        inputs = hidden_states.view(len(self), -1, hidden_states.shape[-1])
        return torch.cat([expert(inputs[number], inputs) for number, expert in enumerate(self)])


@dataclass
class TakenApart:
    """What became of a model's experts.

    Attributes:
        mixtures: layers that become nodes (`traced_mixtures`).
        dense: of the other ones, why → how many experts a layer has at most.
    """

    mixtures: list[Mixture] = field(default_factory=list)
    dense: dict[str, int] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """For the log."""
        lines = []
        if self.mixtures:
            count = len(self.mixtures)
            lines.append(f"onnx: {count} layers of experts are a QMoE each, which computes the chosen ones only")
        for reason, experts in self.dense.items():
            lines.append(
                f"onnx: the graph computes all {experts} experts of a layer for each token, also those that are not "
                f"chosen: its arithmetic is that of a dense model of all its parameters ({reason})"
            )
        return lines


def take_experts_apart(model: nn.Module, weights: RunWeights, no_qmoe: str) -> TakenApart:
    """Put experts that a trace can hold, with the run's weights, in place of transformers' own.

    Args:
        model: edited in place.
        weights: the run.
        no_qmoe: why none becomes a node. Where it is empty, those that can are left as experts that are computed where
            they were chosen, in whose place `mixtures_as_nodes` then puts the nodes.
    """
    for name in replace_experts(model):
        set_tensor(model, name, weights.run.dequantized(name))
    taken = TakenApart()
    for name, module in list(model.named_modules()):
        if isinstance(module, Experts):
            found = no_qmoe or mixture_of(name, module, weights)
            if isinstance(found, Mixture):
                taken.mixtures.append(found)
                continue
            owner, _, leaf = name.rpartition(".")
            kind: Any = _EveryExpertOfAllTokens if isinstance(module, ExpertsOfAllTokens) else _EveryExpert
            setattr(model.get_submodule(owner), leaf, kind(list(module)))
            taken.dense[found] = max(taken.dense.get(found, 0), len(module))
    return taken


def mixtures_of(weights: RunWeights, of_any_type: bool = False) -> list[Mixture]:
    """The layers of experts of a run that `take_experts_apart` makes nodes of, in order, without reading a weight.

    Args:
        of_any_type: also those that would be nodes if they had one type of 4 bits.
    """
    if not any(".experts." in name for name in weights.run.names()):
        return []
    model = transformers_model(weights.run.config_dir)
    replace_experts(model)
    look = possible_mixture if of_any_type else mixture_of
    found = (look(name, module, weights) for name, module in model.named_modules() if isinstance(module, Experts))
    return [one for one in found if isinstance(one, Mixture)]
