"""What a model keeps of each token while it generates, and of a text, from its config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_RECURRENT = ("linear_attention", "mamba", "conv", "recurrent")
_WITHOUT_CACHE = (*_RECURRENT, "mlp", "moe")
_WINDOWED = ("sliding_attention", "chunked_attention")
# Names under which configs have the sizes of Mamba's layers: state, convolution, heads, size of a head.
_MAMBA = (
    ("mamba_d_state", "mamba_d_conv", "mamba_n_heads", "mamba_d_head", "mamba_n_groups"),
    ("ssm_state_size", "conv_kernel", "mamba_num_heads", "mamba_head_dim", "n_groups"),
    ("state_size", "conv_kernel", "num_heads", "head_dim", "n_groups"),
)
_EXPANDS_LATENT = ("minicpm3",)  # in llama.cpp, too


@dataclass(frozen=True)
class LayerCache:
    """What one layer with attention keeps of a token.

    Attributes:
        keys, values: numbers of all key heads.
        latent: what multi-head latent attention needs instead of both; None of other attention.
        window: how many tokens at most; None for all.
    """

    keys: int
    values: int
    latent: int | None
    window: int | None


@dataclass(frozen=True)
class CacheShape:
    """Sizes that decide how much memory a runtime needs besides the weights.

    Attributes:
        layers: those with attention that keep keys of their own.
        window_everywhere: the layers' window is that of all, which llama.cpp does not know.
        state: numbers of all layers' states of fixed size (of Mamba, convolutions, linear attention).
        hidden, intermediate, vocabulary: features of the stream, of the widest feed-forward part, and of the logits.
        expert, chosen: features of an expert, and how many experts a token has; 0 of a model without.
        per_layer_inputs: features of Gemma's per-layer embeddings, of all layers.
    """

    layers: tuple[LayerCache, ...]
    window_everywhere: bool
    state: int
    hidden: int
    intermediate: int
    vocabulary: int
    expert: int
    chosen: int
    per_layer_inputs: int


def cache_shape(config: Any) -> CacheShape:
    """Of a transformers config of a language model."""
    settings = config.to_dict()
    settings |= {name: settings[own] for name, own in config.attribute_map.items() if own in settings}
    count, hidden = int(config.num_hidden_layers), int(config.hidden_size)
    kinds = _kinds(settings, count)
    shared = int(settings.get("num_kv_shared_layers") or 0)  # of Gemma 3n and 4: the last ones read earlier keys
    window = settings.get("sliding_window") or settings.get("attention_chunk_size")
    everywhere = bool(window) and not settings.get("layer_types") and settings.get("use_sliding_window", True)
    of_layer = {int(number): own for number, own in (settings.get("per_layer_config") or {}).items()}
    found = [
        _layer(
            settings | of_layer.get(number, {}), int(window) if window and (everywhere or kind in _WINDOWED) else None
        )
        for number, kind in enumerate(kinds[: count - shared])
        if kind not in _WITHOUT_CACHE
    ]
    widths = settings.get("intermediate_size") or settings.get("ffn_dim") or settings.get("n_inner")
    widest = max(widths) if isinstance(widths, list) else widths or 4 * hidden
    chosen = int(settings.get("num_experts_per_tok") or settings.get("top_k_experts") or 0)
    return CacheShape(
        layers=tuple(layer for layer in found if layer is not None),
        window_everywhere=everywhere,
        state=_states(settings, kinds),
        hidden=hidden,
        intermediate=int(widest),
        vocabulary=int(config.vocab_size),
        expert=int(settings.get("moe_intermediate_size") or widest) if chosen else 0,
        chosen=chosen,
        per_layer_inputs=count * int(settings.get("hidden_size_per_layer_input") or 0),
    )


def _kinds(settings: dict[str, Any], layers: int) -> list[str]:
    named = settings.get("layer_types") or settings.get("layers_block_type")
    if named:
        return list(named)
    attending = settings.get("attn_layer_indices")  # of Bamba
    return ["full_attention" if attending is None or n in attending else "mamba" for n in range(layers)]


def _layer(settings: dict[str, Any], window: int | None) -> LayerCache | None:
    """None without heads (of Mamba)."""
    heads = int(settings.get("num_attention_heads") or 0)
    if not heads:
        return None
    rotated, rank = int(settings.get("qk_rope_head_dim") or 0), settings.get("kv_lora_rank")
    if rank:
        expanded = heads * (int(settings.get("qk_nope_head_dim") or 0) + rotated)
        latent = None if settings.get("model_type") in _EXPANDS_LATENT else int(rank) + rotated
        return LayerCache(expanded, heads * int(settings.get("v_head_dim") or 0), latent, window)
    key_heads = int(settings.get("num_key_value_heads") or settings.get("num_kv_heads") or heads)
    size = int(settings.get("head_dim") or int(settings["hidden_size"]) // heads)
    return LayerCache(key_heads * size, key_heads * size, None, window)


def _states(settings: dict[str, Any], kinds: list[str]) -> int:
    """Numbers of all layers' states. Where none is called recurrent and there are sizes of Mamba's, all have one."""
    one = _state(settings)
    recurrent = sum(kind in _RECURRENT for kind in kinds)
    everywhere = recurrent == 0 and _mamba_state(settings) > 0
    return one * (len(kinds) if everywhere else recurrent)


def _state(settings: dict[str, Any]) -> int:
    value_heads = settings.get("linear_num_value_heads")
    if value_heads:  # the gated delta rule: one matrix a head, and a convolution over queries, keys and values
        keys, values = int(settings["linear_key_head_dim"]), int(settings["linear_value_head_dim"])
        channels = 2 * int(settings["linear_num_key_heads"]) * keys + int(value_heads) * values
        return int(value_heads) * keys * values + (int(settings["linear_conv_kernel_dim"]) - 1) * channels
    if settings.get("conv_L_cache"):  # of LFM2
        return (int(settings["conv_L_cache"]) - 1) * int(settings["hidden_size"])
    return _mamba_state(settings)


def _mamba_state(settings: dict[str, Any]) -> int:
    for state, kernel, heads, size, groups in _MAMBA:
        if settings.get(state) and settings.get(kernel):
            both = settings.get(heads) and settings.get(size)
            features = settings[heads] * settings[size] if both else settings.get("intermediate_size") or 0
            # Mamba 2 runs its convolution over B and C too.
            channels = features + (2 * int(settings.get(groups) or 1) * settings[state] if both else 0)
            return int(features * settings[state] + (settings[kernel] - 1) * channels)
    return 0
