"""Moments of what matrices read and of the slopes of what they put out, token by token, while a block runs backward."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from signround_edge.tuning.block.ldl import factored
from signround_edge.tuning.calibration.activations import equal_weights
from signround_edge.tuning.calibration.input_moments import Hessians

# As a share of the mean of H's diagonal: the lesser one with which tuning tries GPTQ (`tuning.block.gptq.DAMPING`).
_DAMPING = 0.03


class GradientMoments:
    """Sums over tokens t of g_t² of each output and of ‖g_t‖²·x_t·x_tᵀ of the inputs, of every matrix that is watched.

    A token matters to a matrix as much as its own slope says: g and x belong to the same token, and a few tokens have
    inputs a hundred times larger than all others and hardly any slope (the first of a text).
    """

    def __init__(self) -> None:
        self._slopes: dict[str, Tensor] = {}
        self._hessians = Hessians(equal_weights)

    @contextlib.contextmanager
    def watching(self, modules: dict[str, nn.Module]) -> Iterator[None]:
        """Within, every call of a module adds to its sums when the slope of its output is known."""

        def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
            def keep(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
                if output.requires_grad:
                    inputs = args[0].detach()
                    output.register_hook(lambda slope: self.add(name, inputs, slope))

            return keep

        hooks = [module.register_forward_hook(watch(name)) for name, module in modules.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def add(self, name: str, inputs: Tensor, slopes: Tensor) -> None:
        """Add tokens: what the matrix `name` read, [..., in features], and the slopes of its output, [..., out]."""
        slopes = slopes.detach().float().reshape(-1, slopes.shape[-1]).square()
        rows = inputs.reshape(-1, inputs.shape[-1])
        total = slopes.sum(0)
        self._slopes[name] = self._slopes[name] + total if name in self._slopes else total
        self._hessians.add(name, rows, slopes.sum(1, keepdim=True))

    def result(self, tokens: int) -> dict[str, tuple[Tensor, Tensor]]:
        """Name → (E[g²] f32 [out features] over so many tokens, `conditional_variances` f32 [in features])."""
        found: dict[str, tuple[Tensor, Tensor]] = {}
        for name, hessian in self._hessians.result().items():
            slopes = self._slopes[name]
            total = slopes.sum().clamp_min(torch.finfo(torch.float32).tiny)
            found[name] = (slopes / tokens).cpu(), conditional_variances(hessian / total).cpu()
        return found


def conditional_variances(hessian: Tensor) -> Tensor:
    """What an error in each column still costs when those that are rounded after it make up for it: f32 [K].

    With H = Ũ·D·Ũᵀ in the order in which GPTQ rounds columns (`tuning.block.gptq`), δ of GPTQ's codes and e the errors
    of the single roundings, δ·H·δᵀ = Σ_j D_j·e_j² exactly (Chee et al. 2023, arXiv 2307.13304, theorem 6): D is what is
    kept of E[x·xᵀ], for a row of K values instead of K². H's own diagonal where it has no factor.

    Args:
        hessian: E[x·xᵀ] f32 [K, K].
    """
    order = hessian.diagonal().argsort(descending=True, stable=True).flip(0)
    for dtype in (torch.float32, torch.float64):
        damped = hessian[order.unsqueeze(1), order].to(dtype)
        diagonal = damped.diagonal()
        diagonal += _DAMPING * diagonal.mean() + torch.finfo(torch.float32).tiny
        lower = factored(damped)
        if lower is not None:
            found = torch.empty(len(order), dtype=torch.float32, device=hessian.device)
            found[order] = lower.diagonal().square().float()
            return found
    return hessian.diagonal().clone()
