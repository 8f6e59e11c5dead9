"""What a runtime needs besides the model's file: the cache of keys and values for a context, and buffers.

For llama.cpp these are the sizes that a context with the library's default parameters says it has (build b11549,
`llama_kv_cache`, `llama_memory_recurrent`, `sched_reserve`); docs/plan.md has how near they are.
"""

from __future__ import annotations

from dataclasses import dataclass

from signround_edge.evaluation.cache_types import CacheTypes
from signround_edge.model.cache_shape import CacheShape, LayerCache

_F16, _F32 = 2, 4
# Bytes of a cached number: blocks of 32 have an f16 scale.
_CACHE_WIDTH = {"f16": 2.0, "q8_0": 34 / 32, "q4_0": 18 / 32}
_MICRO_BATCH = 512  # tokens that llama.cpp computes at once (`n_ubatch`)
_CELLS = 256  # of which its caches have multiples


@dataclass(frozen=True)
class Needs:
    """Bytes besides the file.

    Attributes:
        cache: of keys and values, and of states.
        buffers: of activations and logits.
    """

    cache: int
    buffers: int

    @property
    def total(self) -> int:
        """Both."""
        return self.cache + self.buffers


def needs_of(shape: CacheShape, target: str, context: int, cache_types: CacheTypes | None = None) -> Needs:
    """What a model needs for one text of `context` tokens.

    Args:
        cache_types: llama.cpp's; None: its own, f16.
    """
    return _of_llama_cpp(shape, context, cache_types or CacheTypes()) if target == "gguf" else _of_onnx(shape, context)


def _of_llama_cpp(shape: CacheShape, context: int, types: CacheTypes) -> Needs:
    k, v = _CACHE_WIDTH[types.k], _CACHE_WIDTH[types.v]
    context = _padded(context)
    tokens = min(context, _MICRO_BATCH)

    def cells(layer: LayerCache) -> int:
        """A window needs room for a micro-batch more; one of all layers (Mistral's) is ignored."""
        if layer.window is None or shape.window_everywhere:
            return context
        return min(context, _padded(layer.window + tokens))

    cache = sum(
        cells(layer) * (layer.keys * k + layer.values * v if layer.latent is None else layer.latent * k)
        for layer in shape.layers
    )
    windows = [cells(layer) for layer in shape.layers if layer.window is not None and not shape.window_everywhere]
    masks = (context if shape.layers else 0) + max(windows, default=0)  # one for layers with a window, one for others
    # The widest moments of a graph: the logits of a micro-batch, the feed-forward part, the experts of all its tokens.
    of_experts = max(3 * shape.expert, 2 * shape.hidden + shape.expert) * shape.chosen
    widest = 5 * shape.hidden + max(shape.vocabulary, 3 * shape.intermediate, of_experts) + shape.per_layer_inputs
    buffers = tokens * (widest * _F32 + masks * _F16) + shape.vocabulary * _F32
    return Needs(int(cache) + shape.state * _F32, buffers)


def _of_onnx(shape: CacheShape, context: int) -> Needs:
    """Our graphs keep the f32 that they compute in, and latent attention's keys and values as transformers does."""
    cache = sum((layer.keys + layer.values) * min(context, layer.window or context) for layer in shape.layers)
    tokens = min(context, _MICRO_BATCH)
    buffers = tokens * (4 * shape.hidden + 3 * shape.intermediate + shape.vocabulary)
    return Needs((cache + shape.state) * _F32, buffers * _F32)


def _padded(cells: int) -> int:
    return cells + -cells % _CELLS
