"""The plan: which format each tensor gets before tuning starts."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from signround_edge.errors import UserError
from signround_edge.model.weights import ModelWeights
from signround_edge.schemes.plan import Plan, listing, make_plan
from signround_edge.schemes.scheme import parse_scheme
from tests.support import save_random_model

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**sizes, vocab_size=100, tie_word_embeddings=False)
    return save_random_model(config, tmp_path_factory.mktemp("untied"))


def plan_of(
    model: Path, scheme: str, embedding: str | None = None, head: str | None = None, types: tuple[str, ...] = ()
) -> Plan:
    parsed = parse_scheme(scheme).with_overrides(types).with_outside_types(embedding, head)
    return make_plan(ModelWeights.open(model), parsed, float_fallback=False)


def formats(plan: Plan) -> dict[str, str | None]:
    return {entry.name: entry.format for entry in plan.tensors}


def test_onnx_embeddings_and_heads_have_8_bits_unless_asked_otherwise(untied: Path) -> None:
    found = formats(plan_of(untied, "onnx:w4g16"))
    assert (found[EMBEDDING], found[HEAD]) == ("Q8_0", "Q8_0")
    found = formats(plan_of(untied, "onnx:w4g16", "w2g64", "w4g32-asym"))
    assert (found[EMBEDDING], found[HEAD]) == ("w2g64", "w4g32-asym")
    assert found["model.layers.0.mlp.up_proj.weight"] == "w4g16"
    found = formats(plan_of(untied, "gguf:q4_0", "Q5_1"))
    assert (found[EMBEDDING], found[HEAD]) == ("Q5_1", "Q8_0")


def test_a_type_by_name_wins_over_one_by_role(untied: Path) -> None:
    found = formats(plan_of(untied, "onnx:w4g16", "w2g64", types=("embed_tokens=w8g16",)))
    assert found[EMBEDDING] == "w8g16"


def test_a_tied_embedding_takes_the_type_of_either(tiny_llama: Path) -> None:
    for given in (("w4g32", None), (None, "w4g32"), ("w4g32", "w4g32")):
        assert formats(plan_of(tiny_llama, "onnx:w4g128", *given))[EMBEDDING] == "Q4_0"
    with pytest.raises(UserError, match="this model's output head is its embedding; give one of them"):
        plan_of(tiny_llama, "onnx:w4g128", "w4g32", "w8g32")


def test_the_bytes_follow_the_types(untied: Path) -> None:
    eight, four = (plan_of(untied, "onnx:w4g16", t).tensor_bytes() for t in ("w8g32", "w4g32"))
    # 100 rows of 64: 32 bytes of codes less, and 1 byte of zero points (two blocks).
    assert eight - four == 100 * (32 + 1)


def test_tables_looked_up_by_token_have_the_embeddings_type_and_tiny_matrices_stay_floats(tmp_path: Path) -> None:
    layers = {
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "intermediate_size": [64, 64],
    }
    config = transformers.Gemma3nTextConfig(
        **layers,
        hidden_size=64,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=100,
        vocab_size_per_layer_input=90,
        hidden_size_per_layer_input=32,
        num_kv_shared_layers=0,
        laurel_rank=32,
        activation_sparsity_pattern=[0.0, 0.0],
    )
    plan = plan_of(save_random_model(config, tmp_path), "gguf:q4_0", embedding="Q5_1")
    found = formats(plan)
    assert plan.lookups == (EMBEDDING, "model.embed_tokens_per_layer.weight")
    assert found["model.embed_tokens_per_layer.weight"] == "Q5_1"
    assert any(
        "looked up by token: model.embed_tokens_per_layer.weight [90, 64] Q5_1" in line for line in listing(plan)
    )
    floats = {name.split("layers.0.")[1] for name, kind in found.items() if kind is None and ".layers.0." in name}
    assert {"altup.prediction_coefs.weight", "laurel.linear_left.weight"} <= floats
    assert found["model.layers.0.per_layer_input_gate.weight"] == "Q4_0"


@pytest.mark.parametrize(("value_heads", "type_"), [(2, "Q4_K"), (4, "Q5_0")])
def test_blocks_stay_whole_where_llama_cpp_moves_columns(value_heads: int, type_: str, tmp_path: Path) -> None:
    """Qwen3.5's value heads are in another order there: super-blocks of 256 would be torn between heads of 128."""
    config = transformers.Qwen3_5TextConfig(
        hidden_size=256,
        intermediate_size=256,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=128,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=value_heads,
        vocab_size=100,
    )
    model = save_random_model(config, tmp_path)
    assert formats(plan_of(model, "gguf:q4_k_s"))["model.layers.0.linear_attn.out_proj.weight"] == type_
    assert formats(plan_of(model, "onnx:w4g128"))["model.layers.0.linear_attn.out_proj.weight"] == "w4g128"
