"""What each matrix of a model is for, as llama.cpp sees it, and what else its presets ask about a model."""

from __future__ import annotations

from typing import Any

from signround_edge.model.experts import split_expert
from signround_edge.schemes.gguf_names import gguf_name
from signround_edge.schemes.gguf_presets import ModelTraits, Place, Role

# The order is llama.cpp's (`tensor_get_category`): attn_qkv holds V.
_ROLES = (
    ("attn_qkv", Role.ATTENTION_V),
    ("attn_kv_b", Role.ATTENTION_V),
    ("attn_v", Role.ATTENTION_V),
    ("attn_k.", Role.ATTENTION_K),
    ("attn_q.", Role.ATTENTION_Q),
    ("attn_output", Role.ATTENTION_OUTPUT),
    ("ffn_up", Role.FFN_UP),
    ("ffn_gate", Role.FFN_GATE),
    ("ffn_down", Role.FFN_DOWN),
)


_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")

# Whose kv_b_proj is stored as two tensors, neither of which llama-quantize takes for V.
_SPLIT_KEYS_AND_VALUES = ("deepseek", "glm4_moe_lite")

# Four to some dozen values a row, of Gemma 3n, which llama-quantize leaves alone too (`tensor_allows_quantization`).
_TOO_SMALL = ("altup", "laurel")


def stays_in_floats(gguf_name: str | None) -> bool:
    """Whether a decoder block's matrix is too small to be worth rounding."""
    return any(part in (gguf_name or "") for part in _TOO_SMALL)


def columns_together(name: str, config: Any) -> int | None:
    """How many values of a row stay together in llama.cpp's order of a matrix's columns; None where none moves.

    Qwen3.5's value heads are repeated for its key heads in another order there (`_reorder_v_heads` in llama.cpp's
    conversion/qwen.py).
    """
    if not config.model_type.startswith("qwen3_5") or not name.endswith("linear_attn.out_proj.weight"):
        return None
    moves = config.linear_num_value_heads != config.linear_num_key_heads
    return int(config.linear_value_head_dim) if moves else None


def places_of(names: list[tuple[str, int]], config: Any) -> dict[str, Place]:
    """Parameter name → place, of all matrices of decoder blocks.

    llama.cpp counts matrices that hold V as they come, and those of feed-forward networks, too, where there are no
    experts (`llama_tensor_get_type_impl` in its llama-quant.cpp).

    Args:
        names: (parameter name, index of the block), in the order of blocks.
    """
    known = {name: gguf_name(name, config.model_type) for name, _ in names}
    roles = {name: role_of(known[name]) for name, _ in names}
    if config.model_type.startswith(_SPLIT_KEYS_AND_VALUES):
        roles |= {name: Role.OTHER for name in roles if name.endswith("kv_b_proj.weight")}
    feed_forward = {Role.FFN_UP, Role.FFN_GATE, Role.FFN_DOWN}
    counted = {Role.ATTENTION_V} if model_traits(config).experts > 1 else {Role.ATTENTION_V, *feed_forward}
    numbers: dict[Role, dict[str | None, int]] = {role: {} for role in {Role.ATTENTION_V, *feed_forward}}
    for name, role in roles.items():
        if role in numbers:
            numbers[role].setdefault(known[name], len(numbers[role]))

    def place(name: str, index: int) -> Place:
        role = roles[name]
        number = numbers[role][known[name]] if role in numbers else index
        layers = len(numbers[role]) if role is Role.ATTENTION_V else None
        expert = split_expert(name)[1] is not None
        return Place(role, number if role in counted else index, layers, number, expert)

    return {name: place(name, index) for name, index in names}


def role_of(gguf_name: str | None) -> Role:
    """The role of a decoder block's matrix."""
    return next((role for part, role in _ROLES if part in (gguf_name or "")), Role.OTHER)


def is_attention_output(name: str, model_type: str) -> bool:
    """Whether a decoder block's matrix of this parameter name is attention's output projection."""
    return role_of(gguf_name(name, model_type)) is Role.ATTENTION_OUTPUT


def writes_to_stream(name: str, model_type: str) -> bool:
    """Whether a decoder block's matrix of this parameter name is an output or down projection, and not an expert's."""
    if split_expert(name)[1] is not None:
        return False
    return role_of(gguf_name(name, model_type)) in (Role.ATTENTION_OUTPUT, Role.FFN_DOWN)


def model_traits(config: Any) -> ModelTraits:
    """What the presets ask about a model, from its Hugging Face config."""
    heads = getattr(config, "num_attention_heads", 1)
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    if getattr(config, "model_type", "") == "falcon":
        if getattr(config, "new_decoder_architecture", False):
            key_heads = config.num_kv_heads
        elif config.multi_query:
            key_heads = 1
        return ModelTraits(config.num_hidden_layers, heads // key_heads, falcon=True)
    experts = next(filter(None, (getattr(config, name, None) for name in _EXPERT_COUNTS)), 0)
    groups = heads // key_heads if _first_block_attends(config) else 0
    return ModelTraits(config.num_hidden_layers, groups, experts=experts)


def _first_block_attends(config: Any) -> bool:
    """Whether the file's count of key heads is not zero for block 0; Qwen's hybrids have one count for all blocks."""
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    if not kinds or config.model_type.startswith("qwen3"):
        return True
    return "attention" in kinds[0] and kinds[0] != "linear_attention"


def head_size(config: Any) -> int:
    """Channels of an attention head, from the Hugging Face config."""
    given = getattr(config, "head_dim", None)
    return int(given or config.hidden_size // config.num_attention_heads)
