"""Mixture-of-experts: each expert as three matrices of its own, so that it is tuned and stored like any other matrix.

transformers holds the experts of a layer as two 3-D parameters; checkpoints, and here the run directory, have one 2-D
tensor a matrix and expert. GGUF files stack them again.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from signround_edge.errors import UserError

_NUMBER = re.compile(r"\.experts\.(\d+)\.")
Index = tuple[int | slice, ...]


@dataclass(frozen=True)
class ExpertPart:
    """Where one expert's matrix or bias is in transformers' parameter of all experts of a layer.

    Attributes:
        fused: that parameter's name.
        index: of the expert's part: its number, then rows and columns.
        transposed: whether the part is [in, out].
    """

    fused: str
    index: Index
    transposed: bool

    def of(self, whole: Tensor) -> Tensor:
        """The expert's own tensor, of the whole parameter."""
        return self.oriented(whole[self.index])

    def oriented(self, part: Tensor) -> Tensor:
        """Between the part and the expert's tensor, either way."""
        return part.T.contiguous() if self.transposed else part.contiguous()


class Expert(nn.Module):
    """One feed-forward network: down(combine(gate(x), up(x))), or without a gate down(combine(up(x)))."""

    def __init__(self, hidden: int, intermediate: int, combine: Callable[..., Tensor], gated: bool, bias: bool) -> None:
        """Parameters are on the meta device.

        Args:
            combine: of gate and up, or of up alone, each [n, intermediate].
        """
        super().__init__()
        if gated:
            self.gate_proj = nn.Linear(hidden, intermediate, bias=bias, device="meta")
        self.up_proj = nn.Linear(hidden, intermediate, bias=bias, device="meta")
        self.down_proj = nn.Linear(intermediate, hidden, bias=bias, device="meta")
        self.combine, self.gated = combine, gated

    def forward(self, inputs: Tensor, tokens: Tensor) -> Tensor:
        """The outputs [n, hidden] for n of a batch's tokens.

        Args:
            inputs: their hidden states [n, hidden].
            tokens: their numbers in the batch, int64 [n]. Nothing is computed with them; they tell hooks whose inputs
                these are.
        """
        up = self.up_proj(inputs)
        output: Tensor = self.down_proj(self.combine(self.gate_proj(inputs), up) if self.gated else self.combine(up))
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


class ExpertsOfAllTokens(Experts):
    """Experts that are given all tokens each, weighted already: zeros where a token did not choose the expert."""

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        """The experts' outputs [experts · tokens, hidden] for inputs of that shape; of no inputs, zeros."""
        inputs = hidden_states.view(len(self), -1, hidden_states.shape[-1])
        result = torch.zeros_like(inputs)
        for number, expert in enumerate(self):
            (tokens,) = torch.where(inputs[number].abs().amax(dim=-1) > 0)
            if len(tokens):
                result[number] = result[number].index_copy(0, tokens, expert(inputs[number, tokens], tokens))
        return result.view_as(hidden_states)


def replace_experts(model: nn.Module) -> dict[str, ExpertPart]:
    """Put `Experts` with parameters on the meta device in place of every module of fused experts.

    Returns:
        Name of each new parameter → where transformers has it.
    Raises:
        UserError: experts of a form that transformers does not describe.
    """
    parts: dict[str, ExpertPart] = {}
    for name, module in list(model.named_modules()):
        if not name.endswith("experts") or not any(p is not None and p.ndim == 3 for p in module._parameters.values()):
            continue
        form = _Form.of(module)
        if form is None:
            raise UserError(
                f"the experts of {type(model).__name__} ({type(module).__name__}) are of a form that transformers does "
                "not describe, so they cannot be taken apart; use another model"
            )
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, form.experts().requires_grad_(False))
        parts |= form.parts(name)
    return parts


@dataclass(frozen=True)
class _Form:
    """How transformers holds the experts of a layer; see its decorator `use_experts_implementation`.

    Attributes:
        module: transformers' module.
        gated, biased: whether they have gates and biases.
        transposed: matrices are [in, out].
        interleaved: rows of gate and up alternate, instead of following one another.
        all_tokens: they are called with all tokens for each of them (Llama 4), and not with the choice of experts.
    """

    module: nn.Module
    gated: bool
    biased: bool
    transposed: bool
    interleaved: bool
    all_tokens: bool

    @classmethod
    def of(cls, module: nn.Module) -> _Form | None:
        known: dict[str, Any] = vars(module)
        all_tokens = len(inspect.signature(type(module).forward).parameters) == 2
        if all_tokens:
            form = cls(module, "gate_up_proj" in module._parameters, False, True, False, True)
        elif "has_bias" in known and not known["has_post_expert_norm"]:
            transposed, interleaved = known["is_transposed"], not known["is_concatenated"]
            form = cls(module, known["has_gate"], known["has_bias"], transposed, interleaved, False)
        else:
            return None
        return form if set(form._matrices) | set(form._biases) == set(module._parameters) else None

    @property
    def _matrices(self) -> list[str]:
        return ["gate_up_proj" if self.gated else "up_proj", "down_proj"]

    @property
    def _biases(self) -> list[str]:
        return [f"{matrix}_bias" for matrix in self._matrices] if self.biased else []

    @property
    def _sizes(self) -> tuple[int, int, int]:
        """Experts, hidden, intermediate."""
        down = self.module._parameters["down_proj"]
        assert down is not None
        count, rows, columns = down.shape
        return (count, columns, rows) if self.transposed else (count, rows, columns)

    def experts(self) -> Experts:
        """Modules of their own that compute the same, parameters on the meta device."""
        count, hidden, intermediate = self._sizes
        kind = ExpertsOfAllTokens if self.all_tokens else Experts
        combine = self._combine()
        return kind(Expert(hidden, intermediate, combine, self.gated, self.biased) for _ in range(count))

    def _combine(self) -> Callable[..., Tensor]:
        module: Any = self.module
        gate = vars(type(module)).get("_apply_gate")
        if not self.gated:
            return lambda up: module.act_fn(up)
        if gate is None or gate.__module__ == "transformers.integrations.moe":
            return lambda gate, up: module.act_fn(gate) * up
        if self.interleaved:
            return lambda gate, up: module._apply_gate(torch.stack([gate, up], dim=-1).flatten(-2))
        return lambda gate, up: module._apply_gate(torch.cat([gate, up], dim=-1))

    def parts(self, name: str) -> dict[str, ExpertPart]:
        """Parameter name of each expert's matrix and bias → where it is in those of the module called `name`."""
        count, _, intermediate = self._sizes
        gate, up = (slice(0, intermediate), slice(intermediate, 2 * intermediate))
        if self.interleaved:
            gate, up = slice(0, None, 2), slice(1, None, 2)
        whole = slice(None)
        rows = {"up_proj": ("up_proj", whole), "down_proj": ("down_proj", whole)}
        if self.gated:
            rows |= {"gate_proj": ("gate_up_proj", gate), "up_proj": ("gate_up_proj", up)}
        found: dict[str, ExpertPart] = {}
        for expert in range(count):
            for matrix, (fused, own) in rows.items():
                index: Index = (expert, whole, own) if self.transposed else (expert, own)
                found[f"{name}.{expert}.{matrix}.weight"] = ExpertPart(f"{name}.{fused}", index, self.transposed)
                if self.biased:
                    bias = ExpertPart(f"{name}.{fused}_bias", (expert, own), False)
                    found[f"{name}.{expert}.{matrix}.bias"] = bias
        return found


def fused_experts(
    tensors: dict[str, Tensor], parts: dict[str, ExpertPart], shapes: dict[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """The tensors with all that `parts` names put together as transformers has it, in `shapes`; others as they are."""
    whole = {name: tensor for name, tensor in tensors.items() if name not in parts}
    for name, part in parts.items():
        if name in tensors:
            if part.fused not in whole:
                whole[part.fused] = torch.full(shapes[part.fused], torch.nan, dtype=tensors[name].dtype)
            whole[part.fused][part.index] = part.oriented(tensors[name])
    return whole


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
