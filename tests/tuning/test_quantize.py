"""`quantize` on small random models of every architecture: tuning pays, is deterministic, resumes to the same bytes."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from support import SIZES, assert_same_files, save_random_model

from signround_edge.errors import UserError
from signround_edge.evaluation.torch_models import load_run_model, load_source_model
from signround_edge.run_directory import RunDirectory
from signround_edge.schemes.scheme import parse_scheme
from signround_edge.tuning.quantize import quantize
from signround_edge.tuning.settings import TuningSettings

SMALL = TuningSettings(steps=20, samples=16, seqlen=32, batch_size=4, lr=0.02, compute_dtype="float32")
LLAMA_LIKE = {**SIZES, "vocab_size": 3072}
CONFIGS: dict[str, transformers.PretrainedConfig] = {
    "llama": transformers.LlamaConfig(**LLAMA_LIKE),
    "qwen2": transformers.Qwen2Config(**LLAMA_LIKE),
    "qwen3": transformers.Qwen3Config(**LLAMA_LIKE, head_dim=32),
    "opt": transformers.OPTConfig(
        hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=3072, word_embed_proj_dim=64
    ),
    "falcon": transformers.FalconConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=3072),
    "bloom": transformers.BloomConfig(hidden_size=64, n_layer=2, n_head=4, vocab_size=3072),
    "gpt2": transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=3072),
    "gpt_neox": transformers.GPTNeoXConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=3072
    ),
    "gemma3": transformers.Gemma3TextConfig(**LLAMA_LIKE, head_dim=16, sliding_window=16),
}


@pytest.fixture(params=sorted(CONFIGS))
def random_model(request: pytest.FixtureRequest, tmp_path: Path, tiny_llama: Path) -> Path:
    return save_random_model(CONFIGS[request.param], tmp_path / "model", tokenizer_from=tiny_llama)


def test_every_architecture_tunes_and_is_never_worse_than_rounding(
    random_model: Path, tmp_path: Path, calibration_text: Path
) -> None:
    run = quantize(random_model, parse_scheme("gguf:q4_0"), tmp_path / "run", str(calibration_text), SMALL)
    reports = [r.report["block"] for r in run.manifest.complete.values() if r.report]
    assert len(reports) == 2
    assert all(r["tuned"] <= r["start"] <= r["rounded"] for r in reports)
    assert any(r["tuned"] < r["rounded"] for r in reports)
    tokens = torch.randint(0, 3072, (1, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = load_source_model(random_model)(input_ids=tokens).logits
        tuned = load_run_model(run)(input_ids=tokens).logits
    assert float((exact - tuned).norm() / exact.norm()) < 0.3


@pytest.mark.parametrize("scheme", ["gguf:q4_1", "gguf:q5_0", "gguf:q8_0", "onnx:w4g32-asym", "onnx:w8g64"])
def test_every_scheme_keeps_float_tensors_bit_for_bit(
    scheme: str, tmp_path: Path, tiny_llama: Path, calibration_text: Path
) -> None:
    model = save_random_model(CONFIGS["qwen2"], tmp_path / "model", tokenizer_from=tiny_llama)
    run = quantize(model, parse_scheme(scheme), tmp_path / "run", str(calibration_text), SMALL)
    source = dict(load_source_model(model).named_parameters())
    floats = [name for name in run.names() if not run.is_quantized(name)]
    assert any(name.endswith("bias") for name in floats)
    assert all(torch.equal(run.float_tensor(name), source[name].detach()) for name in floats)


@pytest.mark.parametrize(
    "settings",
    [
        TuningSettings(**{**vars(SMALL), "granularity": "layer"}),
        pytest.param(
            TuningSettings(**{**vars(SMALL), "granularity": "layer", "compute_dtype": "bfloat16"}),
            marks=pytest.mark.full,
        ),
        TuningSettings(**{**vars(SMALL), "optimizer": "adam", "lr": 0.01}),
        TuningSettings(**{**vars(SMALL), "tune_scales": False, "scale_init": "absmax"}),
        TuningSettings(**{**vars(SMALL), "positions": "follow"}),
        TuningSettings(**{**vars(SMALL), "start": "nearest"}),
        TuningSettings(**{**vars(SMALL), "compute_dtype": "bfloat16"}),
    ],
    ids=["layer-wise", "layer-wise bfloat16", "adam", "scales not tuned", "positions follow", "nearest", "bfloat16"],
)
def test_settings_of_the_paper_run_and_help(
    settings: TuningSettings, tmp_path: Path, tiny_llama: Path, calibration_text: Path
) -> None:
    run = quantize(tiny_llama, parse_scheme("gguf:q4_0"), tmp_path / "run", str(calibration_text), settings)
    reports = [r for record in run.manifest.complete.values() for r in record.report.values()]
    assert all(r["tuned"] <= r["start"] <= r["rounded"] for r in reports)
    assert sum(r["tuned"] for r in reports) < sum(r["rounded"] for r in reports)


def test_same_seed_twice_gives_the_same_bytes(tmp_path: Path, tiny_llama: Path, calibration_text: Path) -> None:
    for name in ("one", "two"):
        quantize(tiny_llama, parse_scheme("onnx:w4g32"), tmp_path / name, str(calibration_text), SMALL)
    assert_same_files(tmp_path / "one", tmp_path / "two")


def command(model: Path, out: Path, calibration: Path) -> list[str]:
    sizes = ["--steps", "30", "--samples", "16", "--seqlen", "32", "--batch-size", "4"]
    arguments = ["quantize", str(model), "--scheme", "gguf:q4_0", "-o", str(out), "--calibration", str(calibration)]
    return [sys.executable, "-m", "signround_edge.cli", *arguments, *sizes]


@pytest.mark.parametrize(
    "attempt", [0, pytest.param(1, marks=pytest.mark.full), pytest.param(2, marks=pytest.mark.full)]
)
def test_killed_at_random_moments_and_resumed_gives_the_same_bytes(
    attempt: int, tmp_path: Path, tiny_llama: Path, calibration_text: Path
) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    began = time.monotonic()
    subprocess.run(command(tiny_llama, whole, calibration_text), check=True, env=environment, capture_output=True)
    duration = time.monotonic() - began
    moment = random.Random(attempt)
    for _ in range(4 if attempt else 1):
        started = [*command(tiny_llama, broken, calibration_text), "--resume"]
        process = subprocess.Popen(started, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(timeout=duration * moment.uniform(0.4, 0.9))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
    finished = [*command(tiny_llama, broken, calibration_text), "--resume"]
    subprocess.run(finished, check=True, env=environment, capture_output=True)
    assert_same_files(whole, broken)


def test_resume_refuses_a_run_of_another_model_or_other_settings(
    tmp_path: Path, tiny_llama: Path, calibration_text: Path
) -> None:
    scheme, out = parse_scheme("gguf:q4_0"), tmp_path / "run"
    other = save_random_model(CONFIGS["llama"], tmp_path / "other", tokenizer_from=tiny_llama)
    quantize(other, scheme, out, str(calibration_text), SMALL)
    with pytest.raises(UserError, match="made from another model"):
        quantize(tiny_llama, scheme, out, str(calibration_text), SMALL, resume=True)
    changed = TuningSettings(**{**vars(SMALL), "steps": 9})
    with pytest.raises(UserError, match="its steps is 20, not 9"):
        quantize(other, scheme, out, str(calibration_text), changed, resume=True)
    with pytest.raises(UserError, match="add --resume"):
        quantize(other, scheme, out, str(calibration_text), SMALL)


def test_changed_part_is_refused(tmp_path: Path, tiny_llama: Path, calibration_text: Path) -> None:
    model = save_random_model(CONFIGS["llama"], tmp_path / "model", tokenizer_from=tiny_llama)
    quantize(model, parse_scheme("gguf:q4_0"), tmp_path / "run", str(calibration_text), SMALL)
    part = tmp_path / "run" / "blocks" / "0001.safetensors"
    data = bytearray(part.read_bytes())
    data[-1] ^= 1
    part.write_bytes(data)
    with pytest.raises(UserError, match=r"0001\.safetensors was changed"):
        RunDirectory.open(tmp_path / "run")


@pytest.mark.parametrize("scheme", ["gguf:q4_0", "gguf:q5_1", "onnx:w4g32-asym"])
def test_a_model_on_the_grid_keeps_its_weights(
    scheme: str, tmp_path: Path, tiny_llama: Path, calibration_text: Path
) -> None:
    """As those trained with quantization in the loop are: neither search, GPTQ, drift nor tuning may move them."""
    model = save_random_model(CONFIGS["llama"], tmp_path / "model", tokenizer_from=tiny_llama)
    on_grid = tmp_path / "on-grid"
    shutil.copytree(model, on_grid)
    first = quantize(model, parse_scheme(scheme), tmp_path / "first", str(calibration_text), replace(SMALL, steps=0))
    load_run_model(first).save_pretrained(on_grid)
    again = quantize(on_grid, parse_scheme(scheme), tmp_path / "again", str(calibration_text), SMALL)
    for name, weight in load_source_model(on_grid).named_parameters():
        if again.is_quantized(name):
            assert torch.equal(again.quantized(name).dequantize(), weight), name
    assert [r.report["block"]["tuned"] for r in again.manifest.complete.values() if r.report] == [0, 0]


def test_rows_that_no_block_divides(tmp_path: Path, tiny_llama: Path, calibration_text: Path) -> None:
    config = transformers.LlamaConfig(**{**LLAMA_LIKE, "intermediate_size": 100})
    model = save_random_model(config, tmp_path / "model", tokenizer_from=tiny_llama)
    with pytest.raises(UserError, match=r"down_proj\.weight has rows of 100 values.*--float-fallback"):
        quantize(model, parse_scheme("gguf:q4_0"), tmp_path / "run", str(calibration_text), SMALL)
    assert not (tmp_path / "run").exists()
    run = quantize(
        model, parse_scheme("gguf:q4_0"), tmp_path / "run", str(calibration_text), SMALL, float_fallback=True
    )
    assert not run.is_quantized("model.layers.0.mlp.down_proj.weight")
