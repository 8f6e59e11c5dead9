"""What llama.cpp stores of a parameter x where it is not x itself: functions of each value, in f32.

Source: `modify_tensors` in llama.cpp's conversion/ (gemma.py, mamba.py, qwen.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Function(NamedTuple):
    """`of(x)`, and how to read it in a sentence."""

    formula: str
    of: Callable[[Tensor], Tensor]


ONE_PLUS = Function("1 + x", lambda x: x + 1)
MINUS_EXP = Function("-exp(x)", lambda x: -torch.exp(x))

FUNCTIONS = (ONE_PLUS, MINUS_EXP, Function("exp(x)", torch.exp), Function("-x", torch.neg))
