"""The streamed pass finds what autograd finds on the whole model: slopes, token by token, of every matrix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from signround_edge.model.weights import ModelWeights
from signround_edge.progress import SILENT
from signround_edge.sensitivity.gradient_moments import conditional_variances
from signround_edge.sensitivity.measure import measure
from signround_edge.sensitivity.measured import Measured
from tests.support import SIZES, TOKENS, save_random_model, split_experts

GEMMA = {
    **SIZES,
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "intermediate_size": [64] * 4,
    "head_dim": 32,
    "vocab_size_per_layer_input": 128,
    "hidden_size_per_layer_input": 32,
    "num_kv_shared_layers": 2,
    "laurel_rank": 16,
    "altup_num_inputs": 2,
    "activation_sparsity_pattern": [0.0] * 4,
}
CONFIGS = {
    "tied": transformers.LlamaConfig(**SIZES, **TOKENS, tie_word_embeddings=True),
    "capped logits, untied": transformers.Gemma2Config(
        **SIZES, **TOKENS, head_dim=16, tie_word_embeddings=False, final_logit_softcapping=5.0
    ),
    "experts": transformers.Qwen3MoeConfig(
        **SIZES, **TOKENS, moe_intermediate_size=64, num_experts=4, num_experts_per_tok=2, decoder_sparse_step=1
    ),
    "transposed": transformers.GPT2Config(
        n_embd=64, n_layer=2, n_head=4, vocab_size=128, n_positions=64, bos_token_id=0, eos_token_id=1
    ),
    "shared keys and per-layer inputs": transformers.Gemma3nTextConfig(**GEMMA, **TOKENS),
}


@pytest.fixture(params=list(CONFIGS))
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Tensor, Measured]:
    model = save_random_model(CONFIGS[request.param], tmp_path / "model")
    tokens = torch.randint(3, 128, (6, 24), generator=torch.Generator().manual_seed(1))
    device = torch.device("cpu")
    return model, tokens, measure(ModelWeights.open(model), tokens, device, 0, SILENT, tmp_path / "scratch", batch=4)


def autograd(folder: Path, tokens: Tensor, labels: Tensor, names: set[str]) -> dict[str, Tensor]:
    """Parameter name → Σ g² of the outputs of its module, by transformers' own model, all of it in memory."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    split_experts(model)
    model.requires_grad_(False)
    found: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def keep(module: nn.Module, _args: Any, output: Tensor) -> Tensor:
            leaf = output.detach().requires_grad_() if isinstance(module, nn.Embedding) else output
            if leaf.requires_grad:
                leaf.register_hook(
                    lambda g: found.__setitem__(name, found.get(name, 0) + g.reshape(-1, g.shape[-1]).square().sum(0))
                )
            return leaf

        return keep

    for name, module in model.named_modules():
        if f"{name}.weight" in names:
            module.register_forward_hook(watch(f"{name}.weight"))
    logits = model(input_ids=tokens, use_cache=False).logits
    nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    return found


def test_slopes_are_those_of_the_whole_models_autograd(case: tuple[Path, Tensor, Measured]) -> None:
    folder, tokens, measured = case
    expected = autograd(folder, tokens, measured.labels, {*measured.matrices, *measured.lookups})
    assert measured.matrices
    for name, found in measured.matrices.items():
        slopes = expected.get(name, torch.zeros_like(found.outputs)) / tokens.numel()
        assert (found.outputs - slopes).norm() <= 1e-4 * slopes.norm(), name
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, table in measured.lookups.items():
        module = model.get_submodule(name.removesuffix(".weight"))
        scale = float(vars(module).get("scalar_embed_scale", 1.0))  # Gemma's tables multiply what they look up
        slopes = scale**2 * expected[name] / tokens.numel()
        assert (table.outputs - slopes).norm() <= 1e-4 * slopes.norm(), name


def test_it_is_the_same_when_read_again(case: tuple[Path, Tensor, Measured], tmp_path: Path) -> None:
    measured = case[2]
    measured.save(tmp_path / "kept.safetensors")
    again = Measured.load(tmp_path / "kept.safetensors")
    assert again.matrices.keys() == measured.matrices.keys()
    for name, found in measured.matrices.items():
        for key, tensor in vars(found).items():
            assert torch.equal(tensor, getattr(again.matrices[name], key))
    assert torch.equal(again.head.probabilities, measured.head.probabilities)
    assert torch.equal(again.labels, measured.labels)


def test_conditional_variances_are_what_gptqs_errors_cost() -> None:
    """δ·H·δᵀ of compensated roundings is Σ D·e², with D by solving for each column's regression on the later ones."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(400, 12, generator=generator) @ torch.randn(12, 12, generator=generator)
    hessian = inputs.T @ inputs / len(inputs)
    order = hessian.diagonal().argsort(descending=True, stable=True).tolist()
    damped = hessian + 0.03 * hessian.diagonal().mean() * torch.eye(12)
    expected = torch.empty(12)
    for position, column in enumerate(order):
        later = order[position + 1 :]
        rest = (
            damped[column, later] @ torch.linalg.solve(damped[later][:, later], damped[later, column]) if later else 0
        )
        expected[column] = damped[column, column] - rest
    torch.testing.assert_close(conditional_variances(hessian), expected, rtol=1e-3, atol=1e-5)
