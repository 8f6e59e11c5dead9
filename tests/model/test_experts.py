"""Mixtures of experts: taken apart they compute what transformers does, and each expert is tuned on its own tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from signround_edge.errors import UserError
from signround_edge.evaluation.torch_models import load_run_model, load_source_model
from signround_edge.model.experts import Expert, Experts, replace_experts, split_expert, stacks
from signround_edge.model.source import SourceModel
from signround_edge.model.weights import ModelWeights
from signround_edge.run_directory import RunDirectory
from signround_edge.schemes.plan import listing, make_plan
from signround_edge.schemes.scheme import parse_scheme
from signround_edge.tuning.calibration import input_moments
from signround_edge.tuning.calibration.activations import equal_weights
from signround_edge.tuning.calibration.input_moments import Hessians, SecondMoments
from signround_edge.tuning.quantize import quantize
from signround_edge.tuning.settings import TuningSettings
from tests.support import assert_same_files, save_random_model

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 3072,
    "initializer_range": 0.1,
}
CONFIGS: dict[str, transformers.PretrainedConfig] = {
    "mixtral": transformers.MixtralConfig(**SIZES, num_local_experts=8),
    "qwen3_moe": transformers.Qwen3MoeConfig(
        **SIZES, head_dim=32, moe_intermediate_size=32, num_experts=6, num_experts_per_tok=3, norm_topk_prob=True
    ),
    "olmoe": transformers.OlmoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, pad_token_id=None),
    # Biases, transposed matrices, rows of gate and up that alternate, a gate of its own.
    "gpt_oss": transformers.GptOssConfig(
        **SIZES, num_local_experts=4, num_experts_per_tok=2, head_dim=16, layer_types=["full_attention"] * 2
    ),
    # All tokens go to all experts, most of them as zeros.
    "llama4": transformers.Llama4TextConfig(
        **SIZES, intermediate_size_mlp=96, num_local_experts=4, num_experts_per_tok=1, pad_token_id=None
    ),
    # No gates.
    "nemotron_h": transformers.NemotronHConfig(
        **SIZES,
        layers_block_type=["attention", "moe"],
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        moe_shared_expert_intermediate_size=32,
        mamba_num_heads=4,
        mamba_head_dim=32,
    ),
}
SMALL = TuningSettings(steps=6, samples=64, seqlen=32, batch_size=4, lr=0.02, compute_dtype="float32")
TOKENS = torch.randint(0, 3072, (2, 40), generator=torch.Generator().manual_seed(0))
MATRICES = ("gate_proj", "up_proj", "down_proj")


@pytest.fixture
def mixtral(tmp_path: Path, tiny_llama: Path) -> Path:
    return save_random_model(CONFIGS["mixtral"], tmp_path / "model", tokenizer_from=tiny_llama)


def edit(model: Path, change: dict[str, torch.Tensor]) -> None:
    """Replace tensors of a saved model."""
    file = model / "model.safetensors"
    tensors = load_file(file)
    assert set(change) <= set(tensors)
    save_file({**tensors, **change}, file, metadata={"format": "pt"})


def our_model(model: Path) -> nn.Module:
    """The model with its experts apart, as tuning has it."""
    weights = ModelWeights.open(model)
    weights.load(weights.decoder.model, "", torch.device("cpu"))
    return weights.decoder.model


def transformers_logits(model: Path) -> torch.Tensor:
    with torch.no_grad():
        return transformers.AutoModelForCausalLM.from_pretrained(model)(input_ids=TOKENS).logits


@pytest.mark.parametrize("kind", CONFIGS)
def test_experts_of_their_own_compute_what_transformers_computes(kind: str, tmp_path: Path) -> None:
    model = save_random_model(CONFIGS[kind], tmp_path / "model")
    with torch.no_grad():
        found = our_model(model)(input_ids=TOKENS).logits
    torch.testing.assert_close(found, transformers_logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_a_checkpoint_with_fused_experts_is_read_as_one_with_separate_ones(kind: str, tmp_path: Path) -> None:
    separate = save_random_model(CONFIGS[kind], tmp_path / "separate")
    model = transformers.AutoModelForCausalLM.from_pretrained(separate)
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    fused = SourceModel.open(tmp_path / "fused")
    assert "model.layers.1.mlp.experts.gate_up_proj" in fused.files
    assert not any("gate_up_proj" in name for name in SourceModel.open(separate).files)
    one, other = (dict(our_model(folder).named_parameters()) for folder in (separate, tmp_path / "fused"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_every_matrix_of_every_expert_is_quantized_and_the_router_is_not(
    mixtral: Path, tmp_path: Path, calibration_text: Path
) -> None:
    run = quantize(mixtral, parse_scheme("gguf:q4_0"), tmp_path / "run", str(calibration_text), SMALL)
    for layer in range(2):
        stem = f"model.layers.{layer}.mlp"
        assert all(run.is_quantized(f"{stem}.experts.{e}.{m}.weight") for e in range(8) for m in MATRICES)
        source = load_file(mixtral / "model.safetensors")
        assert torch.equal(
            run.float_tensor(f"{stem}.gate.weight"), source[f"model.layers.{layer}.block_sparse_moe.gate.weight"]
        )
    reports = [record.report["block"] for record in run.manifest.complete.values() if record.report]
    assert all(report["tuned"] < report["rounded"] for report in reports)
    exact, tuned = load_source_model(mixtral), load_run_model(run)
    name = "model.layers.1.mlp.experts.down_proj"
    whole = exact.get_parameter(name)[7]
    assert 0 < float((tuned.get_parameter(name)[7] - whole).norm() / whole.norm()) < 0.15


@pytest.mark.parametrize("steps", [pytest.param(0, marks=pytest.mark.full), 2])
def test_interrupted_and_resumed_gives_the_same_bytes(
    steps: int, mixtral: Path, tmp_path: Path, calibration_text: Path
) -> None:
    settings = TuningSettings(**{**vars(SMALL), "steps": steps})
    arguments = (str(calibration_text), settings)
    scheme = parse_scheme("gguf:q4_1")
    whole = quantize(mixtral, scheme, tmp_path / "whole", *arguments)
    broken = quantize(mixtral, scheme, tmp_path / "broken", *arguments)
    manifest = json.loads((broken.path / "manifest.json").read_text())
    for part in ("0001", "outside"):
        del manifest["complete"][part]
        (broken.path / "blocks" / f"{part}.safetensors").unlink()
    (broken.path / "manifest.json").write_text(json.dumps(manifest))
    quantize(mixtral, scheme, tmp_path / "broken", *arguments, resume=True)
    assert_same_files(whole.path, broken.path)


def test_an_expert_that_no_token_reaches_is_rounded_and_left_so(
    mixtral: Path, tmp_path: Path, calibration_text: Path
) -> None:
    """Router logits a, −a, 2a, −2a, 0, 0, 0, 0: of experts 4 to 7 none is ever among the first two."""
    row = 0.1 * torch.randn(64, generator=torch.Generator().manual_seed(1))
    router = torch.stack([row, -row, 2 * row, -2 * row, *[torch.zeros(64)] * 4])
    edit(mixtral, {f"model.layers.{i}.block_sparse_moe.gate.weight": router.clone() for i in range(2)})
    runs = []
    for steps in (0, 20):
        settings = TuningSettings(**{**vars(SMALL), "steps": steps, "whole_model_steps": steps // 10})
        scheme = parse_scheme("gguf:q4_0")
        runs.append(quantize(mixtral, scheme, tmp_path / f"run{steps}", str(calibration_text), settings))
    rounded, tuned = runs
    exact = dict(our_model(mixtral).named_parameters())
    for expert in range(8):
        name = f"model.layers.0.mlp.experts.{expert}.down_proj.weight"
        assert torch.equal(rounded.quantized(name).codes, tuned.quantized(name).codes) == (expert >= 4), expert
        scales = (run.quantized(name).fields["scale"] for run in runs)
        assert torch.equal(*scales) == (expert >= 4), expert
        error = (rounded.dequantized(name) - exact[name]).norm() / exact[name].norm()
        assert float(error) < 0.12


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return nn.functional.silu(gate) * up


def routed_layer() -> tuple[Experts, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Four experts, 2 × 3 tokens; expert 3 sees none, expert 2 only the last: (experts, hidden, chosen, weights)."""
    generator = torch.Generator().manual_seed(0)
    experts = Experts(Expert(8, 4, swiglu, True, False) for _ in range(4)).to_empty(device="cpu")
    for parameter in experts.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    hidden = torch.randn(6, 8, generator=generator)
    chosen = torch.tensor([[0, 1], [1, 0], [0, 1], [0, 1], [1, 0], [2, 1]])
    return experts, hidden, chosen, torch.rand(6, 2, generator=generator)


def test_importance_of_an_expert_is_that_of_its_own_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(input_moments, "_PRIOR_TOKENS", 1e-9)
    experts, hidden, chosen, shares = routed_layer()
    names = {f"experts.{i}.{m}.weight": experts.get_submodule(f"{i}.{m}") for i in range(4) for m in MATRICES}
    token_weights = torch.rand(2, 3, 1, generator=torch.Generator().manual_seed(5)) + 0.5
    moments = SecondMoments(equal_weights)
    layer = nn.Module()
    layer.mlp = nn.Module()
    layer.mlp.experts = experts
    with moments.watching(layer, {f"mlp.{name}": module for name, module in names.items()}):
        for _ in range(2):
            experts(hidden, chosen, shares)
            moments.settle(token_weights)
    found = moments.result()
    weights = token_weights.reshape(-1, 1)
    for expert, tokens in ((0, [0, 1, 2, 3, 4]), (1, [0, 1, 2, 3, 4, 5]), (2, [5])):
        inputs = hidden[tokens]
        middle = nn.functional.silu(experts[expert].gate_proj(inputs)) * experts[expert].up_proj(inputs)
        for matrix, x in (("gate_proj", inputs), ("up_proj", inputs), ("down_proj", middle)):
            expected = (x.detach().square() * weights[tokens]).sum(0) / weights[tokens].sum()
            torch.testing.assert_close(found[f"mlp.experts.{expert}.{matrix}.weight"], expected)
    # Expert 3 saw nothing: the mean over all the tokens of its siblings.
    seen = torch.cat([hidden[[0, 1, 2, 3, 4]], hidden, hidden[[5]]])
    by_token = torch.cat([weights[[0, 1, 2, 3, 4]], weights, weights[[5]]])
    expected = (seen.square() * by_token).sum(0) / by_token.sum()
    torch.testing.assert_close(found["mlp.experts.3.up_proj.weight"], expected)


def test_products_of_an_expert_are_of_its_own_tokens() -> None:
    experts, hidden, chosen, shares = routed_layer()
    names = {f"mlp.experts.{i}.{m}.weight": experts.get_submodule(f"{i}.{m}") for i in range(4) for m in MATRICES}
    token_weights = torch.rand(2, 3, 1, generator=torch.Generator().manual_seed(5)) + 0.5
    products = Hessians(equal_weights)
    layer = nn.Module()
    layer.mlp = experts
    with products.watching(layer, names):
        for _ in range(2):
            experts(hidden, chosen, shares)
            products.settle(token_weights)
    found = products.result()
    weighted = hidden * token_weights.reshape(-1, 1).sqrt()
    torch.testing.assert_close(found["mlp.experts.2.gate_proj.weight"], 2 * weighted[[5]].T @ weighted[[5]])
    torch.testing.assert_close(found["mlp.experts.1.up_proj.weight"], 2 * weighted.T @ weighted)
    assert found["mlp.experts.1.up_proj.weight"] is found["mlp.experts.1.gate_proj.weight"]
    assert found["mlp.experts.1.down_proj.weight"].shape == (4, 4)
    assert "mlp.experts.3.up_proj.weight" not in found


def test_importance_of_an_expert_with_few_tokens_leans_on_its_siblings() -> None:
    experts, hidden, chosen, shares = routed_layer()
    names = {f"mlp.experts.{i}.up_proj.weight": experts[i].up_proj for i in range(4)}
    moments = SecondMoments(equal_weights)
    layer = nn.Module()
    layer.mlp = experts
    with moments.watching(layer, names):
        experts(hidden, chosen, shares)
        moments.settle(torch.ones(2, 3, 1))
    found = moments.result()
    shared = found["mlp.experts.3.up_proj.weight"]
    own = hidden[5].square()
    torch.testing.assert_close(found["mlp.experts.2.up_proj.weight"], (own + 8 * shared) / 9)


def test_experts_of_another_form_are_refused() -> None:
    model = nn.Module()
    model.experts = nn.Module()
    model.experts.third_projection = nn.Parameter(torch.zeros(4, 8, 8))
    with pytest.raises(UserError, match="are of a form that transformers does not describe"):
        replace_experts(model)


def test_layer_by_layer_is_refused(mixtral: Path, tmp_path: Path, calibration_text: Path) -> None:
    settings = TuningSettings(**{**vars(SMALL), "granularity": "layer"})
    with pytest.raises(UserError, match=r"mixture of experts.*--granularity block"):
        quantize(mixtral, parse_scheme("gguf:q4_0"), tmp_path / "run", str(calibration_text), settings)
    assert not (tmp_path / "run").exists()


def test_a_missing_expert_is_one_sentence(mixtral: Path) -> None:
    file = mixtral / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.block_sparse_moe.experts.5.w2.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.experts\.down_proj is \[7, 64, 96\] but config"):
        ModelWeights.open(mixtral)


def test_types_by_name_are_for_all_experts_of_a_layer(mixtral: Path) -> None:
    def formats(*overrides: str) -> dict[str, str | None]:
        scheme = parse_scheme("gguf:q4_0").with_overrides(overrides)
        plan = make_plan(ModelWeights.open(mixtral), scheme, False)
        return {entry.name: entry.format for entry in plan.tensors}

    found = formats(r"blk\.1\.ffn_down_exps=Q5_1")
    changed = {name for name, format_ in found.items() if format_ == "Q5_1"}
    assert changed == {f"model.layers.1.mlp.experts.{e}.down_proj.weight" for e in range(8)}
    with pytest.raises(UserError, match=r"experts of model\.layers\.0\.mlp\.experts\.gate_proj\.weight several types"):
        formats(r"experts\.3\.=Q5_1")


def test_a_fallback_of_all_experts_is_one_line(mixtral: Path) -> None:
    plan = make_plan(ModelWeights.open(mixtral), parse_scheme("gguf:q4_k_s"), False)
    lines = [line for line in listing(plan) if "layers.0.mlp" in line]
    assert "fallback: model.layers.0.mlp.experts.down_proj.weight 8 × [64, 96] Q4_K → Q5_0" in lines
    assert len(lines) == 3


def test_names_of_experts() -> None:
    assert split_expert("model.layers.3.mlp.experts.12.up_proj.weight") == (
        "model.layers.3.mlp.experts.up_proj.weight",
        12,
    )
    assert split_expert("model.layers.3.mlp.gate.weight") == ("model.layers.3.mlp.gate.weight", None)
    names = [f"a.experts.{i}.w.weight" for i in range(11)]
    assert stacks(["b.weight", *sorted(names)]) == {"b.weight": ["b.weight"], "a.experts.w.weight": names}


def test_a_run_directory_has_one_entry_a_matrix(mixtral: Path, tmp_path: Path, calibration_text: Path) -> None:
    settings = TuningSettings(**{**vars(SMALL), "steps": 0})
    quantize(mixtral, parse_scheme("gguf:q4_0"), tmp_path / "run", str(calibration_text), settings)
    run = RunDirectory.open(tmp_path / "run")
    assert run.entry("model.layers.0.mlp.experts.3.up_proj.weight").shape == [96, 64]
    assert run.quantized("model.layers.0.mlp.experts.3.up_proj.weight").shape == (96, 64)
