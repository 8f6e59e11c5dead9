"""What llama.cpp is known to compute otherwise is named with its cost, and everything else is still proved."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PretrainedConfig, Qwen2Config

from exporters.gguf import GgufExporter
from exporters.interface import ExportOptions
from runtime_tests.report.report import VerifyReport
from runtime_tests.verify import verify
from signround_edge.demo import tiny_llama_path
from signround_edge.run_directory import RunDirectory
from tests.exporters.gguf.family_settings import YARN
from tests.support import make_run, save_random_model

SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 3072,
    "max_position_embeddings": 4096,
    "initializer_range": 0.06,
}
FRACTIONAL = {**YARN, "original_max_position_embeddings": 64, "truncate": False}
CASES = {
    "truncate True": Qwen2Config(**SHAPE, rope_parameters=FRACTIONAL),
    "rms_norm_eps 0.0": Qwen2Config(**SHAPE, mrope_section=[4, 6, 6], rms_norm_eps=1e-5),
}


def run_of(config: PretrainedConfig, folder: Path) -> RunDirectory:
    return make_run(save_random_model(config, folder / "model", tiny_llama_path()), folder / "run", "gguf:q8_0")


def checked(run: RunDirectory, artifact: Path, text: Path) -> VerifyReport:
    return verify(run, [artifact], text, n_ctx=128, max_windows=2, log=str)


@pytest.mark.parametrize("entry", CASES)
def test_a_small_difference_is_said_with_its_cost_and_the_rest_is_exact(entry: str, text: Path, tmp_path: Path) -> None:
    run = run_of(CASES[entry], tmp_path)
    artifact = GgufExporter().export(run, tmp_path / "model.gguf", ExportOptions(log=str))
    (found,) = checked(run, artifact, text).runtimes
    assert found.status == "pass", found.reason
    assert [entry in note and "KL divergence" in note for note in found.notes] == [True]
    gates = {gate.name: gate for gate in found.gates}
    assert 1e-7 < gates["known_difference_kld_mean"].figure < 0.02
    assert gates["layer_error"].figure < 1e-5  # as of models without such a difference


def test_a_large_difference_fails(text: Path, tmp_path: Path) -> None:
    config = Qwen2Config(**SHAPE, mrope_section=[4, 6, 6], rms_norm_eps=0.05)
    run = run_of(config, tmp_path)
    artifact = GgufExporter().export(run, tmp_path / "model.gguf", ExportOptions(log=str))
    (found,) = checked(run, artifact, text).runtimes
    assert found.status == "fail"
    assert "known to compute is too far" in (found.reason or "")
