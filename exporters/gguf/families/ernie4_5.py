"""ERNIE 4.5, the dense models."""

from __future__ import annotations

import gguf

from exporters.gguf.families.family import NO_OUTPUT_BIAS, Family

# Rotates neighbouring pairs in transformers too, so rows keep their order.
ROWS = (Family("ernie4_5", gguf.MODEL_ARCH.ERNIE4_5, without=NO_OUTPUT_BIAS),)
