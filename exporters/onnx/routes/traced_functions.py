"""What torch.onnx.export has no ONNX form for, said otherwise: complex RoPE, quantiles of a constant."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from functools import partial
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_TOPK = "_gaussian_topk"
_ROTARY = "apply_rotary_emb"
# Module of transformers that rotates complex numbers → the axis of the heads in its queries and keys.
_COMPLEX_ROPE = {
    "transformers.models.deepseek_v2.modeling_deepseek_v2": 1,
    "transformers.models.llama4.modeling_llama4": 2,
}


@contextlib.contextmanager
def functions_with_onnx_forms(model: nn.Module) -> Iterator[None]:
    """Within, functions and methods of the model's own modules that torch cannot translate are ours."""
    replaced: list[tuple[Any, str, Callable[..., Any]]] = []
    for owner in {type(module) for module in model.modules() if _TOPK in vars(type(module))}:
        replaced.append((owner, _TOPK, _gaussian_topk))
    for name in {type(module).__module__ for module in model.modules()} & set(_COMPLEX_ROPE):
        replaced.append((sys.modules[name], _ROTARY, partial(_rotate, axis=_COMPLEX_ROPE[name])))
    kept = [vars(owner)[name] for owner, name, _ in replaced]
    try:
        for owner, name, ours in replaced:
            setattr(owner, name, ours)
        yield
    finally:
        for (owner, name, _), theirs in zip(replaced, kept, strict=True):
            setattr(owner, name, theirs)


def _rotate(xq: Tensor, xk: Tensor, freqs_cis: Tensor, *, axis: int) -> tuple[Tensor, Tensor]:
    """transformers' `apply_rotary_emb` in real numbers.

    Args:
        xq, xk: f32, four axes, of which `axis` counts heads and the last one pairs (real, imaginary).
        freqs_cis: complex [batch, tokens, half the last axis].
        axis: see above.
    """
    cos, sin = (part.unsqueeze(axis) for part in torch.view_as_real(freqs_cis).unbind(-1))

    def rotated(x: Tensor) -> Tensor:
        real, imaginary = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
        parts = [real * cos - imaginary * sin, real * sin + imaginary * cos]
        return torch.stack(parts, dim=-1).flatten(-2)

    return rotated(xq), rotated(xk)


def _gaussian_topk(self: Any, inputs: Tensor) -> Tensor:
    """Gemma 3n's sparse activation. Its quantile of the normal distribution is of a constant; ONNX has no erfinv."""
    multiplier = NormalDist().inv_cdf(self.activation_sparsity)
    mean = torch.mean(inputs, dim=-1, keepdim=True)
    deviation = torch.std(inputs, dim=-1, keepdim=True, unbiased=False)
    return F.relu(inputs - (mean + deviation * multiplier))
