"""Gemma 3n (text): per-layer embeddings, alternating updates (AltUp), LAuReL, shared keys and values, sparse gates."""

from __future__ import annotations

from collections.abc import Iterator

import gguf
import numpy as np
import torch

from exporters.gguf.families.family import TANH_GELU, Family, Stored
from exporters.gguf.families.row_orders import Config
from exporters.gguf.families.shared_layers import sharing_problems

_NO_BIAS = (".q_proj.bias", ".k_proj.bias", ".v_proj.bias", ".o_proj.bias")
_LAYERS_WITH_KEYS, _SPARSE_LAYERS, _SPARSITY = 20, 10, 0.95
# What `load_arch_hparams` and the graph in gemma3n.cpp have as numbers.
_FIXED = {
    "hidden_size_per_layer_input": 256,
    "altup_num_inputs": 4,
    "altup_active_idx": 0,
    "laurel_rank": 64,
    "final_logit_softcapping": 30.0,
    "altup_correct_scale": True,
}
_PER_LAYER_EMBEDDING = "embed_tokens_per_layer.weight"
_STACKS = {"altup_projections": "altup_proj.weight", "altup_unembed_projections": "altup_unembd_proj.weight"}


def _derived(config: Config) -> Config:
    return {"hidden_act": config["hidden_activation"]}


def _keys(writer: gguf.GGUFWriter, config: Config) -> None:
    writer.add_final_logit_softcapping(float(config["final_logit_softcapping"]))
    writer.add_rope_freq_base_swa(float(config["rope_parameters"]["sliding_attention"]["rope_theta"]))
    writer.add_sliding_window(int(config["sliding_window"]))
    writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config["layer_types"]])
    writer.add_shared_kv_layers(int(config["num_kv_shared_layers"]))
    writer.add_altup_active_idx(int(config["altup_active_idx"]))
    writer.add_altup_num_inputs(int(config["altup_num_inputs"]))
    writer.add_embedding_length_per_layer_input(int(config["hidden_size_per_layer_input"]))
    shares = torch.tensor(config["activation_sparsity_pattern"], dtype=torch.float32)
    writer.add_activation_sparsity_scale(torch.distributions.Normal(0, 1).icdf(shares).tolist())


def _problems(config: Config) -> Iterator[str]:
    for name, value in _FIXED.items():
        if config[name] != value:
            yield f"has {name} {value} and no other, this model {config[name]}"
    layers, shared = int(config["num_hidden_layers"]), int(config["num_kv_shared_layers"])
    if layers > _LAYERS_WITH_KEYS and layers - shared != _LAYERS_WITH_KEYS:
        yield f"has keys and values of their own in the first 20 layers, this model in the first {layers - shared}"
    if layers <= _LAYERS_WITH_KEYS and shared:
        yield f"has keys and values of their own in the first 20 layers, this model in the first {layers - shared}"
    if [float(share) for share in config["activation_sparsity_pattern"]] != _sparsity(layers):
        yield "keeps 5 % of the gates in the first 10 layers and all in the others, this model has another pattern"
    if len(set(config["intermediate_size"])) > 1:
        yield "has one intermediate_size for all layers, this model several"
    if any(rope.get("rope_type", "default") != "default" for rope in config["rope_parameters"].values()):
        yield "has unscaled rotation, this model scales it"
    yield from sharing_problems(config)


def _sparsity(layers: int) -> list[float]:
    return [_SPARSITY if layer < _SPARSE_LAYERS else 0.0 for layer in range(layers)]


def _stored(config: Config, name: str, shape: tuple[int, ...]) -> tuple[Stored, ...] | None:
    parts = name.split(".")
    if name.endswith(".correct_output_scale"):
        return (Stored(f"blk.{parts[2]}.altup_correct_scale.weight"),)
    if name.endswith(_PER_LAYER_EMBEDDING) and shape[0] < int(config["vocab_size"]):
        # Tokens without a row of their own take the first, as in transformers.
        rows = np.arange(int(config["vocab_size"]), dtype=np.intp)
        return (Stored("per_layer_token_embd.weight", rows=np.where(rows < shape[0], rows, 0)),)
    stack = next((stack for part, stack in _STACKS.items() if part in parts), None)
    return None if stack is None else (Stored(stack, stacked=True),)


def _unread(config: Config) -> dict[str, tuple[int, ...]]:
    """Keys and values of the layers that take those of earlier ones."""
    layers, dim = int(config["num_hidden_layers"]), int(config["head_dim"])
    matrix = (int(config["num_key_value_heads"]) * dim, int(config["hidden_size"]))
    shapes = {"attn_k.weight": matrix, "attn_v.weight": matrix, "attn_k_norm.weight": (dim,)}
    shared = range(layers - int(config["num_kv_shared_layers"]), layers)
    return {f"blk.{layer}.{name}": shape for layer in shared for name, shape in shapes.items()}


ROWS = (
    Family(
        "gemma3n_text",
        gguf.MODEL_ARCH.GEMMA3N,
        derived=_derived,
        keys=_keys,
        problems=_problems,
        windows=True,
        activations=TANH_GELU,
        without=_NO_BIAS,
        stored=_stored,
        unread=_unread,
    ),
)
