"""Moments of the inputs of matrices, summed up while a block runs: E[x²] of each channel, and hessians."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from signround_edge.model.experts import Expert, stacks
from signround_edge.tuning.ranks import Ranks

# An expert's E[x²] starts as that of all experts of its layer, which counts like this many tokens: some experts see few
# tokens of a calibration text, or none.
_PRIOR_TOKENS = 8
# Hessians are summed up by this many columns: half of a symmetric matrix, at the speed of large products.
_COLUMNS_AT_ONCE = 256


class InputMoments(ABC):
    """Collects the inputs of matrices during forward passes of their block, each token with the weight of its loss."""

    def __init__(self, token_weights: Callable[[Tensor], Tensor]) -> None:
        """`token_weights`: outputs of the block → weights of its tokens [n, seqlen, 1]."""
        self.token_weights = token_weights
        self._watched: list[str] = []
        self._pending: dict[str, tuple[Tensor, Tensor | None]] = {}

    @contextlib.contextmanager
    def watching(self, block: nn.Module, modules: dict[str, nn.Module]) -> Iterator[None]:
        """Within, the input of every call of one of the block's modules waits for `settle`."""
        routed: dict[nn.Module, Tensor] = {}

        def route(expert: nn.Module, args: tuple[Any, ...]) -> None:
            routed.update(dict.fromkeys(expert.children(), args[1]))

        def keep(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            return lambda module, args: self._pending.update({name: (args[0].detach(), routed.get(module))})

        self._watched += modules
        experts = [module for module in block.modules() if isinstance(module, Expert)]
        hooks = [expert.register_forward_pre_hook(route) for expert in experts]
        hooks += [module.register_forward_pre_hook(keep(name)) for name, module in modules.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def waiting(self, name: str) -> Tensor:
        """The input of the last call of a matrix."""
        return self._pending[name][0]

    def settle(self, weights: Tensor) -> None:
        """Add the inputs that wait, with weights [n, seqlen, 1]."""
        for name, (inputs, tokens) in self._pending.items():
            self.add(name, inputs, weights, tokens)
        self._pending.clear()

    def add(self, name: str, inputs: Tensor, weights: Tensor, tokens: Tensor | None = None) -> None:
        """Add inputs of the matrix `name`.

        Args:
            inputs: [n, seqlen, in features], or [n · seqlen, in features] as some models have it.
            weights: of all tokens, [n, seqlen, 1]; [n, seqlen, streams, 1] where hidden states have several streams.
            tokens: numbers of the tokens that are the inputs, where those are not all.
        """
        weights = weights.mean(dim=2) if weights.ndim == 4 else weights
        inputs, weights = inputs.reshape(-1, inputs.shape[-1]), weights.reshape(-1, 1)
        self._add(name, inputs, weights if tokens is None else weights[tokens])

    @abstractmethod
    def _add(self, name: str, inputs: Tensor, weights: Tensor) -> None:
        """Add inputs [rows, in features] with weights f32 [rows, 1]."""


class SecondMoments(InputMoments):
    """E[x²] of the inputs of matrices: the importance of each input channel."""

    def __init__(self, token_weights: Callable[[Tensor], Tensor]) -> None:
        super().__init__(token_weights)
        self._sums: dict[str, Tensor] = {}
        self._totals: dict[str, Tensor] = {}
        self._tokens: dict[str, int] = {}

    def _add(self, name: str, inputs: Tensor, weights: Tensor) -> None:
        total = (inputs.float().square() * weights).sum(0)
        self._sums[name] = self._sums[name] + total if name in self._sums else total
        self._totals[name] = self._totals.get(name, torch.zeros(())) + weights.sum().cpu()
        self._tokens[name] = self._tokens.get(name, 0) + len(inputs)

    def sum_over(self, ranks: Ranks, device: torch.device) -> None:
        """Add what the other ranks' samples give; `device` is the one where the inputs are."""
        if ranks.alone:
            return
        cpu = torch.device("cpu")
        counts = ranks.sum_by_name({name: torch.tensor(count) for name, count in self._tokens.items()}, cpu)
        self._sums = ranks.sum_by_name(self._sums, device)
        self._totals = ranks.sum_by_name(self._totals, cpu)
        self._tokens = {name: int(count) for name, count in counts.items()}

    def result(self) -> dict[str, Tensor]:
        """Name → E[x²] f32 [in features]."""
        found = {name: total / self._totals[name].to(total.device) for name, total in self._sums.items()}
        for names in stacks(self._watched).values():
            if len(names) > 1:
                found |= self._of_experts(names)
        return found

    def tokens(self, name: str) -> int | None:
        """How many tokens came to a matrix; None where it was not watched."""
        return self._tokens.get(name, 0) if name in self._watched else None

    def _of_experts(self, names: list[str]) -> dict[str, Tensor]:
        """The same for one matrix of all experts of a layer."""
        seen = [name for name in names if name in self._sums]
        shared = torch.stack([self._sums[name] for name in seen]).sum(0)
        total = torch.stack([self._totals[name] for name in seen]).sum()
        weight = _PRIOR_TOKENS * total / sum(self._tokens[name] for name in seen)  # of an average token
        prior, zero = (weight / total).to(shared.device) * shared, torch.zeros_like(shared)
        return {
            name: (self._sums.get(name, zero) + prior)
            / (self._totals.get(name, torch.zeros(())) + weight).to(shared.device)
            for name in names
        }


class Hessians(InputMoments):
    """Hessians Σ x·xᵀ of matrices, of whose inputs x they are. Those that share an input (q, k, v) share one sum."""

    def __init__(self, token_weights: Callable[[Tensor], Tensor]) -> None:
        super().__init__(token_weights)
        self._sums: dict[str, Tensor] = {}
        self._owners: dict[str, str] = {}  # matrix → the first one with the same input

    def settle(self, weights: Tensor) -> None:
        """Add the inputs that wait, with weights [n, seqlen, 1]."""
        first: dict[tuple[int, torch.Size], str] = {}
        for name, (inputs, _) in list(self._pending.items()):
            owner = first.setdefault((inputs.data_ptr(), inputs.shape), name)
            if self._owners.setdefault(name, owner) != name:
                del self._pending[name]
        super().settle(weights)

    def _add(self, name: str, inputs: Tensor, weights: Tensor) -> None:
        self._owners.setdefault(name, name)
        rows = inputs.float() * weights.sqrt()
        if name not in self._sums:
            self._sums[name] = rows.new_zeros(rows.shape[1], rows.shape[1])
        for start in range(0, rows.shape[1], _COLUMNS_AT_ONCE):  # on and below the diagonal only
            columns = slice(start, start + _COLUMNS_AT_ONCE)
            self._sums[name][start:, columns].addmm_(rows[:, start:].T, rows[:, columns])

    def sum_over(self, ranks: Ranks, device: torch.device) -> None:
        """Add what the other ranks' samples give; `device` is the one where the inputs are."""
        if ranks.alone:
            return
        for owners in ranks.gathered(self._owners):
            self._owners |= owners
        self._sums = ranks.sum_by_name(self._sums, device)

    def result(self) -> dict[str, Tensor]:
        """Name → hessian f32 [in features, in features] of the matrices that had any input."""
        for hessian in self._sums.values():
            for end in range(_COLUMNS_AT_ONCE, len(hessian), _COLUMNS_AT_ONCE):
                columns = slice(end - _COLUMNS_AT_ONCE, end)
                hessian[columns, end:] = hessian[end:, columns].T
        return {name: self._sums[owner] for name, owner in self._owners.items()}
