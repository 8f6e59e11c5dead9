"""Causal attention for tuning on CPUs, by plain matrix products over blocks of queries.

Tuning runs whole samples forward and backward. There torch's fused CPU kernel is slow: for 8 × 256 tokens, 9 heads of
64, one bf16 forward and backward pass takes 95 ms, these products 30 ms, because the heads that share a key are one
product and a block of queries never meets the keys after it. The price is memory for the probabilities, so long or
wide inputs go to torch's kernel.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch import Tensor, nn

NAME = "signround_edge_blocked"
_MAX_PROBABILITIES = 1 << 27  # values kept for the backward pass: 256 MB in bf16


def use_blocked_attention(model: nn.Module, device: torch.device) -> None:
    """Let a model that would use torch's fused attention use this one, where it pays: on CPUs.

    Only where the model takes its attention from transformers' table of functions: Falcon compares the name with "sdpa"
    itself, and computes attention without a mask under any other name.
    """
    config: Any = model.config
    asks = hasattr(sys.modules[type(model).__module__], "ALL_ATTENTION_FUNCTIONS")
    if asks and device.type == "cpu" and getattr(config, "_attn_implementation", None) == "sdpa":
        _register()
        config._attn_implementation = NAME


@functools.cache
def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)  # None where plain causality is all there is


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' interface of an attention function: plain causal calls by `causal_attention`, others by torch.

    Args:
        query: [n, heads, seqlen, head size].
        key, value: [n, key heads, seqlen, head size].
    Returns:
        [n, seqlen, heads, head size] and None for the probabilities.
    """
    samples, heads, length, _ = query.shape
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    plain = attention_mask is None and causal and not dropout and length == key.shape[2]
    plain = plain and all(kwargs.get(name) is None for name in ("position_bias", "s_aux", "softcap", "cache"))
    if not plain or samples * heads * length * length // 2 > _MAX_PROBABILITIES:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        output: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs
        )
        return output
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    dtype = value.dtype  # straight from a product, so it has the compute dtype; RoPE may have left the others in f32
    found = causal_attention(query.to(dtype), key.to(dtype), value, scale)
    return found.transpose(1, 2).contiguous(), None


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """softmax(scale·QKᵀ + causal mask)·V with grouped heads.

    Args:
        query: [n, heads, seqlen, d]; head h reads key head h // (heads / key heads).
        key: [n, key heads, seqlen, d].
        value: [n, key heads, seqlen, e].
    Returns:
        [n, heads, seqlen, e].
    """
    samples, heads, length, size = query.shape
    key_heads = key.shape[1]
    group = heads // key_heads
    queries = query.reshape(samples * key_heads, group, length, size)
    keys = key.reshape(samples * key_heads, length, size).transpose(1, 2)
    values = value.reshape(samples * key_heads, length, -1)
    rows = 128 if group <= 2 else 64
    outputs = []
    for start in range(0, length, rows):
        end = min(length, start + rows)
        block = queries[:, :, start:end].reshape(samples * key_heads, -1, size)
        mask = block.new_full((end - start, end), float("-inf")).triu(start + 1).repeat(group, 1)
        scores = torch.baddbmm(mask.unsqueeze(0), block, keys[..., :end], alpha=scale)
        found = torch.bmm(scores.softmax(-1), values[:, :end])
        outputs.append(found.view(samples * key_heads, group, end - start, -1))
    return torch.cat(outputs, 2).view(samples, heads, length, -1)
