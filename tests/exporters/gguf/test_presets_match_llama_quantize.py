"""The type that each preset gives to each tensor, and the bytes in all, are those of llama.cpp's own quantizer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from transformers import (
    FalconConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3MoeConfig,
)

from benchmarks import llama_quantize
from benchmarks.float_gguf import write_float_gguf
from exporters.gguf.container.reader import GgufFile
from signround_edge.manifest import TensorEntry
from signround_edge.model.weights import ModelWeights
from signround_edge.schemes.gguf_names import gguf_name
from signround_edge.schemes.gguf_presets import GGUF_PRESETS
from signround_edge.schemes.plan import Plan, make_plan
from signround_edge.schemes.scheme import parse_scheme
from tests.support import save_random_model

_SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "vocab_size": 600}
_EXPERTS = {**_SIZES, "intermediate_size": 256}
_FALCON = {"hidden_size": 256, "num_attention_heads": 8, "vocab_size": 600, "new_decoder_architecture": True}
MODELS: dict[str, PretrainedConfig] = {
    "tied": LlamaConfig(**_SIZES, num_hidden_layers=17, num_key_value_heads=4, tie_word_embeddings=True),
    "grouped_four": LlamaConfig(**_SIZES, num_hidden_layers=9, num_key_value_heads=2),
    "rows_of_192": Qwen2Config(**{**_SIZES, "hidden_size": 192}, num_hidden_layers=8, num_key_value_heads=8),
    "fused_qkv": GPT2Config(n_embd=256, n_layer=8, n_head=4, vocab_size=600, n_positions=64),
    "falcon": FalconConfig(**_FALCON, num_hidden_layers=17, num_kv_heads=2),
    "eight_experts": MixtralConfig(**_EXPERTS, num_hidden_layers=9, num_key_value_heads=2, num_local_experts=8),
    "experts": Qwen3MoeConfig(
        **_EXPERTS,
        num_hidden_layers=17,
        num_key_value_heads=4,
        head_dim=32,
        moe_intermediate_size=256,
        num_experts=4,
        num_experts_per_tok=2,
        norm_topk_prob=True,
    ),
}
# With a matrix the IQ4 presets and Q2_K_S are as ours; Q4_0 and Q5_0 are as ours without (see gguf_presets).
WITHOUT_IMATRIX = ("q4_0", "q5_0")
QUICK = [
    ("tied", "q4_k_m"),
    ("grouped_four", "q2_k_s"),
    ("rows_of_192", "iq4_xs"),
    ("falcon", "q3_k_m"),
    ("eight_experts", "q3_k_s"),
    ("experts", "q4_k_m"),
]
CASES = [
    pytest.param(model, preset, marks=() if (model, preset) in QUICK else pytest.mark.full)
    for model in MODELS
    for preset in GGUF_PRESETS
]

pytestmark = pytest.mark.skipif(
    llama_quantize.why_unavailable() is not None, reason=str(llama_quantize.why_unavailable())
)


@pytest.fixture(scope="session")
def float_file(byte_level_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Writes a model's F32 file once; the model itself lies beside it."""

    @functools.cache
    def write(model: str) -> Path:
        folder = tmp_path_factory.mktemp(model)
        save_random_model(MODELS[model], folder / "model", byte_level_folder)
        return write_float_gguf(folder / "model", folder / "f32.gguf")

    return write


@pytest.mark.parametrize(("model", "preset"), CASES)
def test_types_and_bytes_are_those_of_llama_quantize(
    model: str, preset: str, float_file: Callable[[str], Path], tmp_path: Path
) -> None:
    floats = float_file(model)
    source = GgufFile.open(floats)
    imatrix = None
    if preset not in WITHOUT_IMATRIX:
        shapes = {t.name: t.shape for t in source.tensors.values() if len(t.shape) > 1}
        imatrix = {name: np.ones((*s[:-2], s[-1]), dtype=np.float32) for name, s in shapes.items()}
    llama_quantize.quantize(floats, tmp_path / "theirs.gguf", preset.upper(), imatrix)
    theirs = GgufFile.open(tmp_path / "theirs.gguf").tensors
    plan = plan_of(floats.parent / "model", f"gguf:{preset}")
    ours = types_by_gguf_name(plan, MODELS[model])
    quantized = {name for name, found in ours.items() if found is not None}
    assert quantized
    assert {name: ours[name] for name in quantized} == {name: theirs[name].ggml_type.name for name in quantized}
    assert plan.tensor_bytes() == sum(theirs[name].nbytes for name in ours)


def plan_of(folder: Path, scheme: str) -> Plan:
    return make_plan(ModelWeights.open(folder), parse_scheme(scheme), True)


def named(plan: Plan, config: PretrainedConfig) -> list[tuple[TensorEntry, str]]:
    """Every entry of the plan with its GGUF name."""
    found = []
    for entry in plan.tensors:
        name = gguf_name(entry.name, config.model_type)
        assert name is not None, entry.name
        found.append((entry, name))
    return found


def types_by_gguf_name(plan: Plan, config: PretrainedConfig) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for entry, name in named(plan, config):
        assert found.setdefault(name, entry.format) == entry.format  # the experts of a layer are one tensor
    return found


def test_overrides_by_either_name(tmp_path: Path) -> None:
    folder = save_random_model(MODELS["rows_of_192"], tmp_path / "model")
    scheme = parse_scheme("gguf:q4_0").with_overrides(("ffn_down=q6_k", r"layers\.3\.self_attn\.v_proj=Q5_1"))
    plan = make_plan(ModelWeights.open(folder), scheme, False)
    types = types_by_gguf_name(plan, MODELS["rows_of_192"])
    assert {types[f"blk.{i}.ffn_down.weight"] for i in range(8)} == {"Q6_K"}
    assert types["blk.3.attn_v.weight"] == "Q5_1"
    assert types["blk.4.attn_v.weight"] == "Q4_0"
