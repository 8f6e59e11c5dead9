"""`models`: what will work for a checkpoint, and which families were tried."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from support import SIZES, save_random_model
from torch import Tensor
from transformers import LlamaConfig, MixtralConfig, OPTConfig

from signround_edge.cli import main
from signround_edge.errors import UserError
from signround_edge.outlook import outlook
from signround_edge.tested_models import TestedModels


def test_each_way_is_said_before_a_weight_is_read(tmp_path: Path) -> None:
    model = save_random_model(LlamaConfig(**SIZES), tmp_path)
    found = outlook(str(model))
    ways = {answer.step: (answer.works, answer.how) for answer in found.answers}
    assert ways["quantize"] == (True, "2 blocks of model.layers")
    assert ways["export --format gguf"] == (True, "built in, as llama.cpp's llama")
    assert ways["export --format onnx"] == (True, "by onnxruntime-genai's builder, with a key-value cache")
    assert found.parameters == sum(p.numel() for p in _parameters(model))


def test_what_will_not_work_is_said_with_the_way_out(tmp_path: Path) -> None:
    config = OPTConfig(hidden_size=64, ffn_dim=64, word_embed_proj_dim=64, num_hidden_layers=1, num_attention_heads=2)
    ways = {a.step: a for a in outlook(str(save_random_model(config, tmp_path / "opt"))).answers}
    assert not ways["export --format gguf"].works
    assert "give it as --template" in ways["export --format gguf"].how
    experts = MixtralConfig(**SIZES, num_local_experts=2)
    ways = {a.step: a for a in outlook(str(save_random_model(experts, tmp_path / "experts"))).answers}
    assert ways["export --format gguf"].works
    assert "each expert computes for every token" in ways["export --format onnx"].how


def test_a_folder_that_is_no_model_is_an_answer_and_no_folder_an_error(tmp_path: Path) -> None:
    (answer,) = outlook(str(tmp_path)).answers
    assert (answer.step, answer.works) == ("quantize", False)
    assert "config.json" in answer.how
    with pytest.raises(UserError, match=r"nowhere does not exist; give a model folder"):
        outlook(str(tmp_path / "nowhere"))


def test_the_command_prints_both_tables(tmp_path: Path) -> None:
    model = save_random_model(LlamaConfig(**SIZES), tmp_path)
    shown = CliRunner().invoke(main, ["models", str(model)], catch_exceptions=False).output
    assert "built in, as llama.cpp's llama" in shown
    data = json.loads(CliRunner().invoke(main, ["models", str(model), "--json"]).output)
    assert data["model_type"] == "llama"
    every = CliRunner().invoke(main, ["models"], catch_exceptions=False).output
    tested = TestedModels.read()
    assert all(name[:8] in every for name in tested.models)
    assert json.loads(CliRunner().invoke(main, ["models", "--json"]).output) == tested.to_json()


def _parameters(model: Path) -> list[Tensor]:
    from transformers import AutoModelForCausalLM

    return list(AutoModelForCausalLM.from_pretrained(model).parameters())
