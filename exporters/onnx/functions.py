"""What a graph stores of a parameter x where it is not x itself: functions of each value, in f32.

Source: onnxruntime_genai/models/builders/ 0.18.0 (`add_offset` in base.py; the decay of linear attention in qwen.py).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Formula, as `signround_edge.json` names it → function. "" is x itself.
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "": lambda x: x,
    "1 + x": lambda x: x + 1,
    "-exp(x)": lambda x: -torch.exp(x),
}
