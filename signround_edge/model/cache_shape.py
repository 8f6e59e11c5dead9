"""What a model keeps of each token while it generates, from its config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_WITHOUT_CACHE = ("linear_attention", "mamba", "conv", "mlp", "moe", "recurrent")
_WINDOWED = ("sliding_attention", "chunked_attention")


@dataclass(frozen=True)
class CacheShape:
    """Sizes that decide how much memory a runtime needs besides the weights.

    Attributes:
        values_and_windows: of each layer with attention, (keys and values kept of a token, how many tokens at most or
            None for all).
        hidden, intermediate, vocabulary: features of the stream, of the widest feed-forward part, and of the logits.
    """

    values_and_windows: tuple[tuple[int, int | None], ...]
    hidden: int
    intermediate: int
    vocabulary: int


def cache_shape(config: Any) -> CacheShape:
    """Of a transformers config of a language model. Layers that keep a state of fixed size count nothing."""
    settings = config.to_dict()
    settings |= {name: settings[own] for name, own in config.attribute_map.items() if own in settings}
    layers = int(config.num_hidden_layers)
    kinds = settings.get("layer_types") or settings.get("layers_block_type") or ["full_attention"] * layers
    shared = int(settings.get("num_kv_shared_layers") or 0)  # of Gemma 3n and 4: the last ones read earlier keys
    window = settings.get("sliding_window") or settings.get("attention_chunk_size")
    everywhere = bool(window) and not settings.get("layer_types") and settings.get("use_sliding_window", True)
    values = _values(settings)
    found = [
        (values, int(window) if window and (everywhere or kind in _WINDOWED) else None)
        for kind in kinds[: layers - shared]
        if kind not in _WITHOUT_CACHE
    ]
    widths = settings.get("intermediate_size") or settings.get("ffn_dim") or settings.get("n_inner")
    widest = max(widths) if isinstance(widths, list) else widths or 4 * int(config.hidden_size)
    return CacheShape(tuple(found), int(config.hidden_size), int(widest), int(config.vocab_size))


def _values(settings: dict[str, Any]) -> int:
    """Values a token and layer: keys and values of all key heads, or the latent of multi-head latent attention."""
    latent = settings.get("kv_lora_rank")
    if latent:
        return int(latent) + int(settings.get("qk_rope_head_dim") or 0)
    heads = int(settings.get("num_attention_heads") or 0)
    if not heads:  # of Mamba
        return 0
    key_heads = int(settings.get("num_key_value_heads") or settings.get("num_kv_heads") or heads)
    size = int(settings.get("head_dim") or int(settings["hidden_size"]) // heads)
    return 2 * key_heads * size
