"""Which tensors share a type, and what a runtime needs besides the file."""

from __future__ import annotations

import pytest
import transformers

from signround_edge.api import device_memory
from signround_edge.errors import UserError
from signround_edge.evaluation.cache_types import CacheTypes
from signround_edge.model.cache_shape import cache_shape
from signround_edge.planning.memory import needs_of
from signround_edge.planning.problem import as_nodes, grouped

SIZES = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100}


def test_experts_of_a_layer_and_tensors_of_one_tensor_share_a_type() -> None:
    experts = [f"model.layers.{i}.mlp.experts.{e}.up_proj.weight" for i in (0, 1) for e in (0, 1, 2)]
    q, k, v = (f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkv")
    found = grouped([*experts, q, k, v], [(q, k), ("model.norm.weight",)])
    assert found == [tuple(experts[:3]), tuple(experts[3:]), (q, k), (v,)]


def test_matrices_of_one_node_keep_to_its_types_unless_others_are_asked_for() -> None:
    kinds = dict.fromkeys(("up", "down", "q"), ("w2", "w4", "w8"))
    node = {("up", "down"): ("w4",)}
    assert as_nodes(kinds, node, only=True) == ({"up": ("w4",), "down": ("w4",), "q": kinds["q"]}, [("up", "down")])
    assert as_nodes(kinds, node, only=False) == (kinds, [("up", "down")])
    pinned = {**kinds, "down": ("w8",)}
    assert as_nodes(pinned, node, only=True) == (pinned, [])


@pytest.mark.parametrize(
    ("config", "values", "onnx_values"),
    [
        (transformers.LlamaConfig(**SIZES, num_hidden_layers=3), 3 * 64 * 1024, 3 * 64 * 1000),
        (transformers.GPT2Config(n_embd=64, n_head=4, n_layer=3, vocab_size=100), 3 * 128 * 1024, 3 * 128 * 1000),
        (transformers.BloomConfig(hidden_size=64, n_head=4, n_layer=3, vocab_size=100), 3 * 128 * 1024, 3 * 128 * 1000),
        (transformers.LlamaConfig(**SIZES, num_hidden_layers=3, head_dim=32), 3 * 128 * 1024, 3 * 128 * 1000),
        (transformers.MistralConfig(**SIZES, num_hidden_layers=3, sliding_window=10), 3 * 64 * 1024, 3 * 64 * 10),
        (
            transformers.Gemma3TextConfig(
                **SIZES, num_hidden_layers=2, head_dim=16, sliding_window=10,
                layer_types=["sliding_attention", "full_attention"],
            ),
            64 * (768 + 1024),  # 10 and a micro-batch of 512, in steps of 256
            64 * (10 + 1000),
        ),
        (
            transformers.DeepseekV3Config(
                **SIZES, num_hidden_layers=2, kv_lora_rank=32, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8
            ),
            2 * 40 * 1024,  # the latent
            2 * 4 * (16 + 8) * 1000,  # as transformers has them, keys and values of each head
        ),
    ],
    ids=["llama", "gpt2", "bloom", "head size", "window everywhere", "window in some layers", "latent"],
)  # fmt: skip
def test_the_cache_is_of_keys_and_values_that_are_kept(
    config: transformers.PretrainedConfig, values: int, onnx_values: int
) -> None:
    shape = cache_shape(config)
    assert needs_of(shape, "gguf", 1000).cache == 2 * values
    assert needs_of(shape, "gguf", 1000, CacheTypes("q8_0", "q8_0")).cache == values * 34 // 32
    assert needs_of(shape, "onnx", 1000).cache == 4 * onnx_values


MAMBA2 = transformers.Mamba2Config(
    hidden_size=64, num_hidden_layers=3, num_heads=8, head_dim=16, vocab_size=100, state_size=32, n_groups=1,
    conv_kernel=4,
)  # fmt: skip
LINEAR = transformers.Qwen3NextConfig(
    **SIZES, num_hidden_layers=2, head_dim=16, layer_types=["linear_attention", "full_attention"],
    linear_conv_kernel_dim=4, linear_key_head_dim=8, linear_value_head_dim=16, linear_num_key_heads=2,
    linear_num_value_heads=4,
)  # fmt: skip


@pytest.mark.parametrize(
    ("config", "state", "values"),
    [
        (MAMBA2, 3 * (128 * 32 + 3 * (128 + 2 * 32)), 0),
        (LINEAR, 4 * 8 * 16 + 3 * (2 * 2 * 8 + 4 * 16), 64 * 1024),
        (
            transformers.Lfm2Config(
                **SIZES, num_hidden_layers=2, conv_L_cache=3, layer_types=["conv", "full_attention"]
            ),
            2 * 64,
            64 * 1024,
        ),
    ],
    ids=["mamba2", "linear attention", "convolution"],
)
def test_states_of_fixed_size_count_in_f32(config: transformers.PretrainedConfig, state: int, values: int) -> None:
    assert needs_of(cache_shape(config), "gguf", 1024).cache == 4 * state + 2 * values
    assert needs_of(cache_shape(config), "onnx", 1024).cache == 4 * state + 4 * values


def test_a_devices_memory_is_its_profiles() -> None:
    assert device_memory("pixel-8") == "2000M"
    with pytest.raises(UserError, match="--device cpu-x86: its profile has no memory_budget_mb; add one, or give"):
        device_memory("cpu-x86")
