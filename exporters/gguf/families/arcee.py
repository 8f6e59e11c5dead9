"""Arcee (AFM): Llama with squared ReLU and no gate."""

from __future__ import annotations

import gguf

from exporters.gguf.families.family import NO_OUTPUT_BIAS, RELU_SQUARED, Family
from exporters.gguf.families.llama import interleaved_order

ROWS = (
    Family(
        "arcee",
        gguf.MODEL_ARCH.ARCEE,
        interleaved_order,
        rope_scalings=("llama3",),
        activations=RELU_SQUARED,
        without=NO_OUTPUT_BIAS,
    ),
)
