"""RMSNorm for tuning on CPUs: forward and backward in pieces that stay in the cache, bf16 out where bf16 goes in next.

transformers' RMSNorm is a dozen passes over f32 memory, forward and backward, and its f32 output is converted once for
every matrix that reads it. This one converts once. With w the weight, r = (mean(x²) + ε)^(−1/2) and n = x·r:

    y = w·n        ∂L/∂w = Σ g·n        ∂L/∂x = r·(g·w − n·mean(g·w·n))
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

_CHUNK_VALUES = 1 << 16


def use_cached_rms_norm(model: nn.Module, device: torch.device) -> None:
    """Let the model's RMSNorms give the products' dtype under autocast, where they are plain ones.

    On CPUs they compute in cache-sized pieces; elsewhere what they give is converted once for all that read it.
    """
    adapted: dict[type, type | None] = {}
    for module in model.modules():
        kind = type(module)
        if kind.__name__.endswith("RMSNorm"):
            if kind not in adapted:
                adapted[kind] = _adapted(kind, device) if _is_plain(module) else None
            module.__class__ = adapted[kind] or kind


def _adapted(kind: type, device: torch.device) -> type:
    """The class with another forward pass: one for all modules, so that a compiled block is one for all blocks."""
    forward = _cached_forward if device.type == "cpu" else _converted_forward
    return type(kind.__name__, (kind,), {"forward": forward(kind), "__module__": kind.__module__})


def _is_plain(module: nn.Module) -> bool:
    """Whether the module computes w·x/rms(x); Gemma's (1 + w) and others do not."""
    weight = module._parameters.get("weight")
    if weight is None or weight.ndim != 1 or not isinstance(_epsilon(module), float):
        return False
    probe = copy.deepcopy(module)
    generator = torch.Generator().manual_seed(0)
    random = torch.rand(weight.shape, generator=generator) + 0.5
    probe._parameters["weight"] = nn.Parameter(random, requires_grad=False)
    inputs = torch.randn(4, len(random), generator=generator) * 0.01  # small, so that a different ε shows
    with torch.no_grad():
        expected = probe(inputs)
    found = rms_norm(inputs, random, _epsilon(module), torch.float32)
    return isinstance(expected, Tensor) and torch.allclose(expected, found, rtol=1e-5, atol=0)


def _epsilon(module: nn.Module) -> Any:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


def _cached_forward(kind: Any) -> Callable[[nn.Module, Tensor], Tensor]:
    def forward(self: nn.Module, hidden_states: Tensor) -> Tensor:
        if hidden_states.dtype != torch.float32 or not torch.is_autocast_enabled("cpu"):
            found: Tensor = kind.forward(self, hidden_states)
            return found
        weight = self._parameters["weight"]
        assert weight is not None
        return rms_norm(hidden_states, weight, _epsilon(self), torch.get_autocast_dtype("cpu"))

    return forward


def _converted_forward(kind: Any) -> Callable[[nn.Module, Tensor], Tensor]:
    def forward(self: nn.Module, hidden_states: Tensor) -> Tensor:
        device = hidden_states.device.type
        found: Tensor = kind.forward(self, hidden_states)
        if hidden_states.dtype != torch.float32 or not torch.is_autocast_enabled(device):
            return found
        return found.to(torch.get_autocast_dtype(device))

    return forward


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, dtype: torch.dtype) -> Tensor:
    """w·x/sqrt(mean(x²) + ε) over the last dimension.

    Args:
        x: f32 [..., features].
        weight: f32 [features].
        dtype: of the result.
    """
    found: Tensor = _RmsNorm.apply(x, weight, epsilon, dtype)
    return found


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float, dtype: torch.dtype) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        inverse = rows.new_empty(len(rows), 1)
        out = rows.new_empty(rows.shape, dtype=dtype)
        for part in _chunks(rows):
            piece = rows[part]
            mean = torch.linalg.vecdot(piece, piece).div_(rows.shape[1]).add_(epsilon)
            inverse[part] = mean.rsqrt_().unsqueeze(-1)
            out[part] = (piece * inverse[part]).mul_(weight)
        ctx.save_for_backward(x, weight, inverse)
        return out.view(x.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None, None]:  # type: ignore[override]
        x, weight, inverse = ctx.saved_tensors
        rows, slopes = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, x.shape[-1])
        out = torch.empty_like(rows)
        weight_slope = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for part in _chunks(rows):
            normed = rows[part] * inverse[part]
            slope = slopes[part].float()
            if weight_slope is not None:
                weight_slope += (slope * normed).sum(0)
            slope = slope * weight
            mean = torch.linalg.vecdot(slope, normed).div_(rows.shape[1]).unsqueeze(-1)
            torch.mul(slope.addcmul_(normed, mean, value=-1), inverse[part], out=out[part])
        return out.view(x.shape), weight_slope, None, None


def _chunks(rows: Tensor) -> Iterator[slice]:
    size = max(1, _CHUNK_VALUES // rows.shape[1])
    return (slice(start, start + size) for start in range(0, len(rows), size))
