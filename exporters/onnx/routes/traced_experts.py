"""Mixtures of experts in a traced graph: every expert computes for every token, and what was not chosen counts zero.

Which rows an expert multiplies depends on data, and no trace holds that. With each expert as three matrices of its own
(`signround_edge.model.experts`) they become MatMulNBits like all others, at the price of computing them all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from signround_edge.model.decoder import set_tensor
from signround_edge.model.experts import Experts, ExpertsOfAllTokens, replace_experts
from signround_edge.run_directory import RunDirectory


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


def take_experts_apart(model: nn.Module, run: RunDirectory) -> int:
    """Put experts that a trace can hold, with the run's weights, in place of transformers' own.

    Returns:
        How many experts a layer has at most; 0 where the model is no mixture.
    """
    for name in replace_experts(model):
        set_tensor(model, name, run.dequantized(name))
    most = 0
    for name, module in list(model.named_modules()):
        if isinstance(module, Experts):
            owner, _, leaf = name.rpartition(".")
            kind: Any = _EveryExpertOfAllTokens if isinstance(module, ExpertsOfAllTokens) else _EveryExpert
            setattr(model.get_submodule(owner), leaf, kind(list(module)))
            most = max(most, len(module))
    return most
