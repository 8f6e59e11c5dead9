"""GLM-4 (0414 and later)."""

from __future__ import annotations

import gguf

from exporters.gguf.families.family import Family

# Rotates neighbouring pairs in transformers too, so rows keep their order.
ROWS = (Family("glm4", gguf.MODEL_ARCH.GLM4, partial_rotary=True),)
