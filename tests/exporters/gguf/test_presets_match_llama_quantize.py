"""The type that each preset gives to each tensor, and the bytes in all, are those of llama.cpp's own quantizer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from transformers import (
    DeepseekV2Config,
    FalconConfig,
    Gemma4TextConfig,
    GPT2Config,
    GraniteMoeHybridConfig,
    Lfm2Config,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3_5TextConfig,
    Qwen3Config,
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
from signround_edge.tuning.quantize import quantize
from signround_edge.tuning.settings import TuningSettings
from tests.exporters.gguf.conftest import export
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
# Of kinds of layers that not every block has, or whose matrices are stored otherwise than they are tuned.
_NEW = {**_SIZES, "num_hidden_layers": 9, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
_ATTENDING = (2, 5, 8)
NEW: dict[str, PretrainedConfig] = {
    "hybrid": Lfm2Config(
        **_NEW,
        block_auto_adjust_ff_dim=False,
        layer_types=["full_attention" if i in _ATTENDING else "conv" for i in range(9)],
    ),
    "delta_net": Qwen3_5TextConfig(
        **_NEW,
        head_dim=64,
        layer_types=["full_attention" if i in _ATTENDING else "linear_attention" for i in range(9)],
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
    ),
    "hybrid_experts": GraniteMoeHybridConfig(
        **{**_NEW, "intermediate_size": 256},
        num_local_experts=4,
        num_experts_per_tok=2,
        shared_intermediate_size=256,
        layer_types=["full_attention" if i in _ATTENDING else "linear_attention" for i in range(9)],
        mamba_n_heads=8,
        mamba_d_head=64,
        mamba_d_state=16,
        mamba_n_groups=1,
        mamba_chunk_size=32,
    ),
    "mla": DeepseekV2Config(
        **{**_NEW, "num_key_value_heads": 8},
        kv_lora_rank=256,
        q_lora_rank=256,
        qk_rope_head_dim=32,
        qk_nope_head_dim=64,
        v_head_dim=64,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        moe_intermediate_size=256,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
    ),
    "per_layer_embeddings": Gemma4TextConfig(
        **{**_NEW, "num_hidden_layers": 8},
        head_dim=32,
        global_head_dim=64,
        sliding_window=32,
        layer_types=["sliding_attention", "full_attention"] * 4,
        hidden_size_per_layer_input=32,
        vocab_size_per_layer_input=600,
        num_kv_shared_layers=0,
    ),
    "vision_text": Qwen3Config(**_NEW, head_dim=128, mrope_section=[24, 20, 20], num_deepstack_layers=3),
}
NEW_QUICK = ("per_layer_embeddings",)
# With a matrix the IQ4 presets and Q2_K_S are as ours; Q4_0 and Q5_0 are as ours without (see gguf_presets).
WITHOUT_IMATRIX = ("q4_0", "q5_0")
# Each model once and each group of presets; of the others those that llama-quantize takes longest for are IQ1 to IQ3.
QUICK = [
    ("tied", "q4_k_m"),
    ("grouped_four", "q2_k_s"),
    ("rows_of_192", "iq4_xs"),
    ("falcon", "q3_k_m"),
    ("eight_experts", "q3_k_s"),
    ("grouped_four", "iq3_m"),
    ("experts", "mxfp4_moe"),
]
CASES = [
    pytest.param(model, preset, marks=() if (model, preset) in QUICK else pytest.mark.full)
    for model in MODELS
    for preset in GGUF_PRESETS
    if (model, preset) != ("rows_of_192", "q1_0")  # llama-quantize refuses: Q1_0 falls back to nothing
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


@pytest.mark.parametrize("preset", ["q4_k_m", pytest.param("q2_k_s", marks=pytest.mark.full)])
@pytest.mark.parametrize("model", [n if n in NEW_QUICK else pytest.param(n, marks=pytest.mark.full) for n in NEW])
def test_types_of_newer_kinds_of_layers_are_those_of_llama_quantize(
    model: str, preset: str, byte_level_folder: Path, calibration_text: Path, tmp_path: Path
) -> None:
    """Tensors of the exported file beside those that llama-quantize makes of its floats."""
    folder = save_random_model(NEW[model], tmp_path / "model", byte_level_folder)
    settings = TuningSettings(steps=0, samples=1, seqlen=16)
    scheme = parse_scheme(f"gguf:{preset}")
    run = quantize(folder, scheme, tmp_path / "run", str(calibration_text), settings, source_check="off")
    ours = GgufFile.open(export(run, tmp_path / "ours.gguf")).tensors
    floats = GgufFile.open(export(run, tmp_path / "f32.gguf", dtype="f32"))
    shapes = {t.name: t.shape for t in floats.tensors.values() if len(t.shape) > 1}
    imatrix = {name: np.ones((*s[:-2], s[-1]), dtype=np.float32) for name, s in shapes.items()}
    llama_quantize.quantize(tmp_path / "f32.gguf", tmp_path / "theirs.gguf", preset.upper(), imatrix)
    theirs = GgufFile.open(tmp_path / "theirs.gguf").tensors
    quantized = {name: t.ggml_type.name for name, t in ours.items() if t.ggml_type.name not in ("F32", "F16")}
    assert len(quantized) > 40
    other = {name: (kind, theirs[name].ggml_type.name) for name, kind in quantized.items()}
    assert {name: both for name, both in other.items() if both[0] != both[1]} == {}


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
