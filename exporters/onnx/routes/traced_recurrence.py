"""Recurrent layers in a traced graph: one node of ONNX Runtime for the loop over tokens.

transformers' functions loop over chunks, or solve a triangular system row by row; a trace would hold the loop for one
length, unrolled. While a model is traced they give way to `com.microsoft.LinearAttention` (ONNX Runtime's
docs/ContribOperators.md), whose recurrence S ← exp(g)·S + k ⊗ (…), o = scale·qᵀS is theirs for any number of tokens:
gated delta net, Mamba-2 and Mamba.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_EPSILON = 1e-6  # of transformers' l2norm


@contextlib.contextmanager
def recurrences_as_nodes(model: nn.Module) -> Iterator[None]:
    """Within, the recurrent functions in the model's own modules of transformers are ours."""
    modules = {sys.modules[type(module).__module__] for module in model.modules()}
    kept: list[tuple[Any, str, Callable[..., Any]]] = []
    try:
        for module in modules:
            for name, ours in _FUNCTIONS.items():
                if name in vars(module):
                    kept.append((module, name, vars(module)[name]))
                    setattr(module, name, ours)
        yield
    finally:
        for module, name, theirs in kept:
            setattr(module, name, theirs)


def _linear_attention(
    rule: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor,
    beta: Tensor | None,
    state: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(outputs [batch, tokens, heads, v], state [batch, heads, k, v]) by one node.

    Args:
        rule: "gated" or "gated_delta".
        query, key: f32 [batch, tokens, heads, k].
        value: f32 [batch, tokens, heads, v].
        decay: f32 [batch, tokens, heads], or [batch, tokens, heads, k] where each row of the state has its own.
        beta: f32 [batch, tokens, heads] of "gated_delta".
        state: f32 [batch, heads, k, v] before these tokens.
        scale: of the outputs.
    """
    heads = value.shape[2]
    packed = [query.flatten(2), key.flatten(2), value.flatten(2), state]
    packed.append(decay.flatten(2) if decay.ndim == 4 else decay)
    if beta is not None:
        packed.append(beta)
    output, final = torch.onnx.ops.symbolic_multi_out(
        "com.microsoft::LinearAttention",
        packed,
        {"update_rule": rule, "q_num_heads": heads, "kv_num_heads": heads, "scale": scale},
        dtypes=[torch.float32, torch.float32],
        shapes=[packed[2].shape, state.shape],
        version=1,
    )
    return output.reshape(value.shape), final


def _gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    chunk_size: int = 64,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' `torch_chunk_gated_delta_rule`."""
    heads = value.shape[2]
    if use_qk_l2norm_in_kernel:
        query, key = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + _EPSILON) for x in (query, key))
    query, key = (x.repeat_interleave(heads // x.shape[2], dim=2) if x.shape[2] != heads else x for x in (query, key))
    if initial_state is None:
        initial_state = value.new_zeros(value.shape[0], heads, key.shape[3], value.shape[3])
    scale = query.shape[3] ** -0.5
    output, final = _linear_attention("gated_delta", query, key, value, g, beta, initial_state, scale)
    return output, final if output_final_state else None


def _mamba2_chunk_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    **kwargs: Any,
) -> Any:
    """transformers' `mamba2_chunk_scan`: its state is the transpose of the node's."""
    batch, _, heads, size = hidden_states.shape
    dt = dt if dt_bias is None else dt + dt_bias
    dt = F.softplus(dt) if dt_softplus else dt
    dt = torch.clamp(dt, min=dt_limit[0], max=dt_limit[1])
    key, query = (x.repeat_interleave(heads // x.shape[2], dim=2) for x in (B, C))
    value = hidden_states * dt[..., None]
    state = (
        hidden_states.new_zeros(batch, heads, B.shape[3], size)
        if initial_states is None
        else initial_states.transpose(2, 3)
    )
    output, final = _linear_attention("gated", query, key, value, A * dt, None, state, 1.0)
    if D is not None:
        output = output + D[..., None] * hidden_states
    return (output, final.transpose(2, 3)) if return_final_states else output


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "torch_chunk_gated_delta_rule": _gated_delta_rule,
    "mamba2_chunk_scan": _mamba2_chunk_scan,
}
