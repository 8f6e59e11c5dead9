"""Mixture-of-experts: each expert as three matrices of its own, so that it is tuned and stored like any other matrix.

transformers holds the experts of a layer as two 3-D parameters; checkpoints, and here the run directory, have one 2-D
tensor a matrix and expert. GGUF files stack them again.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from signround_edge.errors import UserError

_NUMBER = re.compile(r"\.experts\.(\d+)\.")
# What transformers' decorator `use_experts_implementation` says of experts that compute as `Experts` does.
_PLAIN = {
    "has_gate": True,
    "has_bias": False,
    "has_post_expert_norm": False,
    "is_transposed": False,
    "is_concatenated": True,
}


@dataclass(frozen=True)
class ExpertPart:
    """Where one expert's matrix is in transformers' parameter of all experts of a layer.

    Attributes:
        fused: that parameter's name; it is [experts, rows, cols].
        expert: the expert's number.
        rows: its rows.
    """

    fused: str
    expert: int
    rows: slice


class Expert(nn.Module):
    """One gated feed-forward network: down(act(gate(x)) · up(x))."""

    def __init__(self, hidden: int, intermediate: int, activation: nn.Module) -> None:
        """Parameters are on the meta device."""
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False, device="meta")
        self.up_proj = nn.Linear(hidden, intermediate, bias=False, device="meta")
        self.down_proj = nn.Linear(intermediate, hidden, bias=False, device="meta")
        self.act_fn = activation

    def forward(self, inputs: Tensor, tokens: Tensor) -> Tensor:
        """The outputs [n, hidden] for n of a batch's tokens.

        Args:
            inputs: their hidden states [n, hidden].
            tokens: their numbers in the batch, int64 [n]. Nothing is computed with them; they tell hooks whose inputs
                these are.
        """
        output: Tensor = self.down_proj(self.act_fn(self.gate_proj(inputs)) * self.up_proj(inputs))
        return output


class Experts(nn.ModuleList):
    """The experts of a layer. Stands where transformers has a module with fused weights, and computes the same."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The weighted sums of the chosen experts' outputs, [tokens, hidden].

        Args:
            hidden_states: [tokens, hidden].
            top_k_index: numbers of the experts chosen for each token, int64 [tokens, k].
            top_k_weights: their weights, [tokens, k].
        """
        result = torch.zeros_like(hidden_states)
        for number, expert in enumerate(self):
            tokens, place = torch.where(top_k_index == number)
            if not len(tokens):
                continue
            output = expert(hidden_states.index_select(0, tokens), tokens)
            weighted = output * top_k_weights[tokens, place].unsqueeze(-1)
            result.index_add_(0, tokens, weighted.to(result.dtype))
        return result


def replace_experts(model: nn.Module) -> dict[str, ExpertPart]:
    """Put `Experts` with parameters on the meta device in place of every module of fused experts.

    Returns:
        Name of each new parameter → where transformers has it.
    Raises:
        UserError: experts that compute something else (biases, other gates).
    """
    parts: dict[str, ExpertPart] = {}
    for name, module in list(model.named_modules()):
        fused = {leaf: p for leaf, p in module._parameters.items() if p is not None and p.ndim == 3}
        if not fused or not name.endswith("experts"):
            continue
        if set(module._parameters) != {"gate_up_proj", "down_proj"} or not _is_plain(module):
            raise UserError(
                f"the experts of {type(model).__name__} ({type(module).__name__}) have another form than Mixtral's and "
                "Qwen3-MoE's, which cannot be quantized; use another model"
            )
        count, hidden, intermediate = fused["down_proj"].shape
        experts = Experts(Expert(hidden, intermediate, module.act_fn) for _ in range(count))
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, experts.requires_grad_(False))
        slices = {
            "gate_proj": ("gate_up_proj", slice(0, intermediate)),
            "up_proj": ("gate_up_proj", slice(intermediate, 2 * intermediate)),
            "down_proj": ("down_proj", slice(0, hidden)),
        }
        parts |= {
            f"{name}.{expert}.{matrix}.weight": ExpertPart(f"{name}.{whole}", expert, rows)
            for expert in range(count)
            for matrix, (whole, rows) in slices.items()
        }
    return parts


def fused_experts(tensors: dict[str, Tensor], parts: dict[str, ExpertPart]) -> dict[str, Tensor]:
    """The tensors with all that `parts` names put together as transformers has it; others as they are."""
    whole = {name: tensor for name, tensor in tensors.items() if name not in parts}
    pieces: dict[str, dict[int, list[tuple[int, Tensor]]]] = {}
    for name, part in parts.items():
        if name in tensors:
            pieces.setdefault(part.fused, {}).setdefault(part.expert, []).append((part.rows.start, tensors[name]))
    for fused, experts in pieces.items():
        rows = (torch.cat([t for _, t in sorted(found, key=lambda p: p[0])]) for _, found in sorted(experts.items()))
        whole[fused] = torch.stack(list(rows))
    return whole


def _is_plain(module: nn.Module) -> bool:
    known: dict[str, Any] = vars(module)
    gate = vars(type(module)).get("_apply_gate")
    own_gate = gate is not None and gate.__module__ != "transformers.integrations.moe"
    return "has_bias" in known and not own_gate and all(known.get(k, v) == v for k, v in _PLAIN.items())


def split_expert(name: str) -> tuple[str, int | None]:
    """A parameter's name without its expert's number, and that number (None: it belongs to no expert).

    >>> split_expert("model.layers.3.mlp.experts.12.up_proj.weight")
    ('model.layers.3.mlp.experts.up_proj.weight', 12)
    """
    match = _NUMBER.search(name)
    if match is None:
        return name, None
    return _NUMBER.sub(".experts.", name), int(match[1])


def stacks(names: list[str]) -> dict[str, list[str]]:
    """Name without expert number → the parameters of that name, by expert; those of no expert stand alone."""
    found: dict[str, list[tuple[int, str]]] = {}
    for name in names:
        stack, expert = split_expert(name)
        found.setdefault(stack, []).append((expert or 0, name))
    return {stack: [name for _, name in sorted(members)] for stack, members in found.items()}
