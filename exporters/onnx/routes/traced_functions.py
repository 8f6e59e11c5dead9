"""What torch.onnx.export has no ONNX form for, said otherwise: complex numbers by angle, quantiles of a constant."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from statistics import NormalDist
from typing import Any

import torch
from onnxscript import opset20 as op
from torch import Tensor, nn
from torch.nn import functional as F

_TOPK = "_gaussian_topk"


def translations() -> dict[Any, Callable[..., Any]]:
    """Operator of torch → its ONNX form, for `custom_translation_table`."""
    return {torch.ops.aten.polar.default: _polar}


@contextlib.contextmanager
def methods_with_onnx_forms(model: nn.Module) -> Iterator[None]:
    """Within, methods of the model's own classes that torch cannot translate are ours."""
    classes = {type(module) for module in model.modules() if _TOPK in vars(type(module))}
    kept = {cls: vars(cls)[_TOPK] for cls in classes}
    try:
        for cls in classes:
            setattr(cls, _TOPK, _gaussian_topk)
        yield
    finally:
        for cls, theirs in kept.items():
            setattr(cls, _TOPK, theirs)


def _polar(length: Any, angle: Any) -> Any:
    """Complex numbers as torch.onnx holds them: f32 [..., 2]."""
    last = op.Constant(value_ints=[-1])
    parts = [op.Unsqueeze(op.Mul(length, part), last) for part in (op.Cos(angle), op.Sin(angle))]
    return op.Concat(*parts, axis=-1)


def _gaussian_topk(self: Any, inputs: Tensor) -> Tensor:
    """Gemma 3n's sparse activation: its quantile of the normal distribution is of a constant, and erfinv not in ONNX."""
    multiplier = NormalDist().inv_cdf(self.activation_sparsity)
    mean = torch.mean(inputs, dim=-1, keepdim=True)
    deviation = torch.std(inputs, dim=-1, keepdim=True, unbiased=False)
    return F.relu(inputs - (mean + deviation * multiplier))
