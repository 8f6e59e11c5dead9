"""A rotated model is the same function in another basis, or none is written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from support import SIZES, TOKENS, make_run, save_random_model

from signround_edge.errors import UserError
from signround_edge.evaluation.perplexity import TorchSession, evaluate, text_windows
from signround_edge.evaluation.torch_models import load_run_model, load_source_model
from signround_edge.model.source import SourceModel
from signround_edge.transforms.rotation import random_rotation, rotate

ROTATABLE = {
    "llama, tied, with biases": transformers.LlamaConfig(
        **SIZES, attention_bias=True, mlp_bias=True, tie_word_embeddings=True
    ),
    "mistral": transformers.MistralConfig(**SIZES),
    "qwen2, tied": transformers.Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": transformers.Qwen3Config(**SIZES, head_dim=16),
}
OTHERS = {
    "gpt2": transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=128, n_positions=128),
    "gemma3": transformers.Gemma3TextConfig(**SIZES, **TOKENS, head_dim=16),
    "qwen3-moe": transformers.Qwen3MoeConfig(
        **SIZES, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
    ),
}


def test_the_rotation_is_orthogonal() -> None:
    rotation = random_rotation(96, seed=1).double()
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(96, dtype=torch.float64), atol=1e-6, rtol=0)
    assert not torch.equal(random_rotation(96, seed=2), random_rotation(96, seed=1))


@pytest.mark.parametrize("family", ROTATABLE)
def test_logits_stay_and_weights_are_others(family: str, tmp_path: Path) -> None:
    model = save_random_model(ROTATABLE[family], tmp_path / "model")
    assert rotate(model, tmp_path / "rotated") < 1e-10
    before, after = SourceModel.open(model), SourceModel.open(tmp_path / "rotated")
    assert "lm_head.weight" in after.files
    for name in (
        "model.embed_tokens.weight",
        "model.layers.1.mlp.down_proj.weight",
        "model.layers.0.mlp.up_proj.weight",
    ):
        one, other = before.tensor(name).float(), after.tensor(name)
        assert float((one - other).norm() / one.norm()) > 0.5
    assert torch.equal(after.tensor("model.layers.1.input_layernorm.weight"), torch.ones(64))


@pytest.mark.parametrize("family", OTHERS)
def test_a_model_of_another_kind_is_refused_and_nothing_is_left(family: str, tmp_path: Path) -> None:
    model = save_random_model(OTHERS[family], tmp_path / "model")
    with pytest.raises(UserError, match="its residual stream cannot be rotated"):
        rotate(model, tmp_path / "rotated")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


def test_a_folder_that_exists_is_kept(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exists already; give another -o"):
        rotate(tiny_llama, tmp_path)


def test_a_rotated_model_is_quantized_like_any_other(tiny_llama: Path, evaluation_text: Path, tmp_path: Path) -> None:
    rotate(tiny_llama, tmp_path / "rotated")
    run = make_run(tmp_path / "rotated", tmp_path / "run", "gguf:q8_0")
    windows = text_windows(tiny_llama, evaluation_text, 128, 2)
    scores = evaluate(TorchSession(load_run_model(run)), windows, TorchSession(load_source_model(tiny_llama)))
    assert 0 < scores.kld_mean < 0.01
