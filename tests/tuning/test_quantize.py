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
from click.testing import CliRunner
from support import SIZES, assert_same_files, save_random_model

from signround_edge.cli import main
from signround_edge.errors import UserError
from signround_edge.evaluation.torch_models import load_run_model, load_source_model
from signround_edge.run_directory import RunDirectory
from signround_edge.schemes.scheme import parse_scheme
from signround_edge.tuning.lock import LOCK_FILE
from signround_edge.tuning.quantize import quantize
from signround_edge.tuning.settings import TuningSettings

SMALL = TuningSettings(steps=20, samples=16, seqlen=32, batch_size=4, lr=0.02, compute_dtype="float32")
SHORT = replace(SMALL, steps=2, samples=4)  # for what does not ask how well it is tuned
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


RANDOM_OR_TRAINED = pytest.mark.parametrize(
    "trained", [False, pytest.param(True, marks=pytest.mark.full)], ids=["random", "trained"]
)


def random_llama(folder: Path, tokenizer_from: Path) -> Path:
    """A model for what does not ask for a trained one; a sixth of the time of tiny-llama."""
    return save_random_model(CONFIGS["llama"], folder / "model", tokenizer_from=tokenizer_from)


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
    run = quantize(model, parse_scheme(scheme), tmp_path / "run", str(calibration_text), SHORT)
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
@RANDOM_OR_TRAINED
def test_settings_of_the_paper_run_and_help(
    trained: bool, settings: TuningSettings, tmp_path: Path, tiny_llama: Path, calibration_text: Path
) -> None:
    if not trained:
        settings = replace(settings, steps=8, samples=8)
    model = tiny_llama if trained else random_llama(tmp_path, tiny_llama)
    run = quantize(model, parse_scheme("gguf:q4_0"), tmp_path / "run", str(calibration_text), settings)
    reports = [r for record in run.manifest.complete.values() for r in record.report.values()]
    assert all(r["tuned"] <= r["start"] <= r["rounded"] for r in reports)
    assert sum(r["tuned"] for r in reports) < sum(r["rounded"] for r in reports)


@RANDOM_OR_TRAINED
def test_same_seed_twice_gives_the_same_bytes(
    trained: bool, tmp_path: Path, tiny_llama: Path, calibration_text: Path
) -> None:
    model = tiny_llama if trained else random_llama(tmp_path, tiny_llama)
    for name in ("one", "two"):
        quantize(model, parse_scheme("onnx:w4g32"), tmp_path / name, str(calibration_text), SMALL)
    assert_same_files(tmp_path / "one", tmp_path / "two")


def command(model: Path, out: Path, calibration: Path) -> list[str]:
    sizes = ["--steps", "30", "--samples", "16", "--seqlen", "32", "--batch-size", "4"]
    arguments = ["quantize", str(model), "--scheme", "gguf:q4_0", "-o", str(out), "--calibration", str(calibration)]
    return [*arguments, *sizes]


def kill_at_random(arguments: list[str], out: Path, after_s: float) -> None:
    """Run the command in a process of its own and kill it that many seconds after it has begun to work in `out`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = [sys.executable, "-m", "signround_edge.cli", *arguments]
    process = subprocess.Popen(started, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (out / LOCK_FILE).exists() and process.poll() is None:  # what it imports first takes longer than the rest
        time.sleep(0.01)
    try:
        process.wait(timeout=after_s)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()


@pytest.mark.parametrize(
    ("attempt", "trained"),
    [(0, False), *[pytest.param(attempt, True, marks=pytest.mark.full) for attempt in range(3)]],
)
def test_killed_at_random_moments_and_resumed_gives_the_same_bytes(
    attempt: int, trained: bool, tmp_path: Path, tiny_llama: Path, calibration_text: Path
) -> None:
    model = tiny_llama if trained else random_llama(tmp_path, tiny_llama)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    began = time.monotonic()
    assert CliRunner().invoke(main, command(model, whole, calibration_text)).exit_code == 0
    duration = time.monotonic() - began
    moment = random.Random(attempt)
    resumed = [*command(model, broken, calibration_text), "--resume"]
    for _ in range(4 if attempt else 1):
        (broken / LOCK_FILE).unlink(missing_ok=True)  # of the process that was killed
        kill_at_random(resumed, broken, duration * moment.uniform(0.2, 0.9))
    assert CliRunner().invoke(main, resumed).exit_code == 0
    assert_same_files(whole, broken)


def test_resume_refuses_a_run_of_another_model_or_other_settings(
    tmp_path: Path, tiny_llama: Path, calibration_text: Path
) -> None:
    scheme, out = parse_scheme("gguf:q4_0"), tmp_path / "run"
    other = save_random_model(CONFIGS["llama"], tmp_path / "other", tokenizer_from=tiny_llama)
    quantize(other, scheme, out, str(calibration_text), SHORT)
    with pytest.raises(UserError, match="made from another model"):
        quantize(tiny_llama, scheme, out, str(calibration_text), SHORT, resume=True)
    changed = replace(SHORT, steps=9)
    with pytest.raises(UserError, match="its steps is 2, not 9"):
        quantize(other, scheme, out, str(calibration_text), changed, resume=True)
    with pytest.raises(UserError, match="add --resume"):
        quantize(other, scheme, out, str(calibration_text), SHORT)


def test_changed_part_is_refused(tmp_path: Path, tiny_llama: Path, calibration_text: Path) -> None:
    model = save_random_model(CONFIGS["llama"], tmp_path / "model", tokenizer_from=tiny_llama)
    quantize(model, parse_scheme("gguf:q4_0"), tmp_path / "run", str(calibration_text), SHORT)
    part = tmp_path / "run" / "blocks" / "0001.safetensors"
    data = bytearray(part.read_bytes())
    data[-1] ^= 1
    part.write_bytes(data)
    with pytest.raises(UserError, match=r"0001\.safetensors was changed"):
        RunDirectory.open(tmp_path / "run")


@pytest.mark.parametrize("scheme", ["gguf:q4_0", pytest.param("gguf:q5_1", marks=pytest.mark.full), "onnx:w4g32-asym"])
def test_a_model_on_the_grid_keeps_its_weights(
    scheme: str, tmp_path: Path, tiny_llama: Path, calibration_text: Path
) -> None:
    """As those trained with quantization in the loop are: neither search, GPTQ, drift nor tuning may move them."""
    model = save_random_model(CONFIGS["llama"], tmp_path / "model", tokenizer_from=tiny_llama)
    on_grid = tmp_path / "on-grid"
    shutil.copytree(model, on_grid)
    first = quantize(model, parse_scheme(scheme), tmp_path / "first", str(calibration_text), replace(SHORT, steps=0))
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
        quantize(model, parse_scheme("gguf:q4_0"), tmp_path / "run", str(calibration_text), SHORT)
    assert not (tmp_path / "run").exists()
    run = quantize(
        model, parse_scheme("gguf:q4_0"), tmp_path / "run", str(calibration_text), SHORT, float_fallback=True
    )
    assert not run.is_quantized("model.layers.0.mlp.down_proj.weight")
