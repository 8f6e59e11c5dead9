"""What a runtime needs besides the model's file: the cache of keys and values for a context, and buffers."""

from __future__ import annotations

from dataclasses import dataclass

from signround_edge.model.cache_shape import CacheShape

# Bytes of a cached value: llama.cpp keeps f16 (`--cache-type-k`), our ONNX graphs the f32 that they compute in.
_CACHE_WIDTH = {"gguf": 2, "onnx": 4}
_MICRO_BATCH = 512  # tokens that llama.cpp computes at once (`n_ubatch`)
_F32 = 4


@dataclass(frozen=True)
class Needs:
    """Bytes besides the file.

    Attributes:
        cache: Σ over layers with attention of values a token · width · min(context, window).
        buffers: of activations and logits.
    """

    cache: int
    buffers: int

    @property
    def total(self) -> int:
        """Both."""
        return self.cache + self.buffers


def needs_of(shape: CacheShape, target: str, context: int) -> Needs:
    """What a model needs for texts of `context` tokens.

    Buffers are what is alive at once of a micro-batch, in f32: hidden states four times (stream, norm, attention's in
    and output), the wider side of the feed-forward part three times, and the logits.
    """
    tokens = min(context, _MICRO_BATCH)
    cache = sum(
        values * min(context, window or context) * _CACHE_WIDTH[target] for values, window in shape.values_and_windows
    )
    return Needs(cache, tokens * (4 * shape.hidden + 3 * shape.intermediate + shape.vocabulary) * _F32)
