"""`quantize --imatrix` and `--save-imatrix`: whose E[x²] weighs the scale search, and where it goes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner, Result
from support import save_random_model

from exporters.gguf.imatrix.file import read_imatrix, write_imatrix
from signround_edge.cli import main
from signround_edge.files import sha256_of
from signround_edge.run_directory import RunDirectory

SIZES = ["--steps", "0", "--samples", "4", "--seqlen", "32", "--batch-size", "2"]
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIGS: dict[str, transformers.PretrainedConfig] = {
    "untied": transformers.LlamaConfig(**SMALL, num_key_value_heads=2, vocab_size=3072, tie_word_embeddings=False),
    "tied": transformers.Qwen2Config(**SMALL, num_key_value_heads=2, vocab_size=3072, tie_word_embeddings=True),
    "gpt2": transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=3072),
}
LLAMA_MATRICES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


@pytest.fixture
def model(tmp_path: Path, tiny_llama: Path) -> Path:
    return save_random_model(CONFIGS["untied"], tmp_path / "model", tokenizer_from=tiny_llama)


def quantize(model: Path, run: Path, calibration: Path, *more: object, code: int = 0) -> Result:
    arguments = ["quantize", model, "--scheme", "gguf:q4_0", "-o", run, "--calibration", calibration, *SIZES, *more]
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == code, result.output
    return result


def last_line(result: Result) -> str:
    assert "Traceback" not in result.stderr
    return result.stderr.strip().splitlines()[-1]


def same_codes(one: Path, other: Path) -> dict[str, bool]:
    a, b = RunDirectory.open(one), RunDirectory.open(other)
    return {n: torch.equal(a.quantized(n).codes, b.quantized(n).codes) for n in a.names() if a.is_quantized(n)}


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_what_was_saved_and_given_back_gives_the_same_run(
    kind: str, tmp_path: Path, tiny_llama: Path, calibration_text: Path
) -> None:
    model = save_random_model(CONFIGS[kind], tmp_path / "model", tokenizer_from=tiny_llama)
    file = tmp_path / "imatrix.gguf"
    quantize(model, tmp_path / "own", calibration_text, "--save-imatrix", file)
    names = ("attn_qkv", "attn_output", "ffn_up", "ffn_down") if kind == "gpt2" else LLAMA_MATRICES
    expected = {f"blk.{block}.{name}.weight" for block in range(2) for name in names}
    assert set(read_imatrix(file)) == expected | ({"output.weight"} if kind == "untied" else set())
    result = quantize(model, tmp_path / "given", calibration_text, "--imatrix", file)
    assert "note:" not in result.stderr
    assert all(same_codes(tmp_path / "own", tmp_path / "given").values())
    manifest = json.loads((tmp_path / "given" / "manifest.json").read_text())
    assert manifest["settings"]["imatrix_sha256"] == sha256_of(file)


def test_saved_figures_are_the_mean_squares_of_the_inputs(model: Path, tmp_path: Path, calibration_text: Path) -> None:
    from signround_edge.evaluation.torch_models import load_source_model
    from signround_edge.model.tokenizer import load_tokenizer
    from signround_edge.tuning.calibration.text import calibration_tokens

    file = tmp_path / "imatrix.gguf"
    exact = ["--loss", "mse", "--compute-dtype", "float32"]
    quantize(model, tmp_path / "run", calibration_text, "--save-imatrix", file, *exact)
    tokens = calibration_tokens(str(calibration_text), load_tokenizer(model), 4, 32)
    seen: dict[str, torch.Tensor] = {}
    torch_model = load_source_model(model)
    for name, module in torch_model.named_modules():
        module.register_forward_pre_hook(
            lambda _module, args, name=name: seen.update({name: args[0]}) if args else None
        )
    with torch.no_grad():
        torch_model(input_ids=tokens)
    found = read_imatrix(file)
    for name, ggml_name in (("self_attn.k_proj", "attn_k"), ("mlp.down_proj", "ffn_down")):
        expected = seen[f"model.layers.1.{name}"].square().mean((0, 1)).numpy()
        np.testing.assert_allclose(found[f"blk.1.{ggml_name}.weight"], expected, rtol=1e-4)


def test_another_importance_gives_other_codes_and_is_needed_to_resume(
    model: Path, tmp_path: Path, calibration_text: Path
) -> None:
    rng = np.random.default_rng(0)
    lengths = {name: 128 if name == "ffn_down" else 64 for name in LLAMA_MATRICES}
    vectors = {f"blk.{b}.{n}.weight": rng.random(k).astype(np.float32) ** 8 for b in (0, 1) for n, k in lengths.items()}
    file = write_imatrix(tmp_path / "imatrix.gguf", vectors, 1000, 512, ["text"])
    quantize(model, tmp_path / "own", calibration_text)
    quantize(model, tmp_path / "given", calibration_text, "--imatrix", file)
    same = same_codes(tmp_path / "own", tmp_path / "given")
    differing = {name for name, equal in same.items() if not equal}
    # The head's own E[x²] is that of the quantized model's activations, so it follows the blocks.
    assert differing - {"lm_head.weight"} == {n for n in same if ".layers." in n}
    for run, flags in ((tmp_path / "given", []), (tmp_path / "own", ["--imatrix", file])):
        refused = quantize(model, run, calibration_text, "--resume", *flags, code=2)
        assert "cannot be resumed: its imatrix_sha256 is" in last_line(refused)
    quantize(model, tmp_path / "given", calibration_text, "--imatrix", file, "--resume")


def test_what_the_file_lacks_comes_from_the_calibration(model: Path, tmp_path: Path, calibration_text: Path) -> None:
    file = write_imatrix(
        tmp_path / "imatrix.gguf", {"blk.1.ffn_down.weight": np.geomspace(1e-6, 1, 128)}, 1000, 512, ["text"]
    )
    quantize(model, tmp_path / "own", calibration_text)
    result = quantize(model, tmp_path / "given", calibration_text, "--imatrix", file)
    notes = [line for line in result.stderr.splitlines() if line.startswith(f"note: {file} lacks")]
    assert len(notes) == 1
    assert "lacks 14 of 15 matrices (model.layers.0.self_attn.q_proj.weight, …)" in notes[0]
    same = same_codes(tmp_path / "own", tmp_path / "given")
    differing = [name for name, equal in same.items() if not equal and name != "lm_head.weight"]
    assert differing == ["model.layers.1.mlp.down_proj.weight"]


def test_an_embedding_is_weighed_where_the_file_has_it(model: Path, tmp_path: Path, calibration_text: Path) -> None:
    vectors = {
        "token_embd.weight": np.geomspace(1e-6, 1, 64).astype(np.float32),
        "blk.0.attn_q.weight": np.ones(64, dtype=np.float32),
    }
    file = write_imatrix(tmp_path / "imatrix.gguf", vectors, 1000, 512, ["text"])
    quantize(model, tmp_path / "own", calibration_text)
    quantize(model, tmp_path / "given", calibration_text, "--imatrix", file)
    assert not same_codes(tmp_path / "own", tmp_path / "given")["model.embed_tokens.weight"]


def test_importance_of_another_model_is_refused(model: Path, tmp_path: Path, calibration_text: Path) -> None:
    longer = write_imatrix(tmp_path / "longer.gguf", {"blk.0.attn_q.weight": np.ones(96)}, 100, 10, ["text"])
    message = last_line(quantize(model, tmp_path / "run", calibration_text, "--imatrix", longer, code=2))
    assert "blk.0.attn_q.weight has 96 values, but model.layers.0.self_attn.q_proj.weight has 64 input" in message
    other = write_imatrix(tmp_path / "other.gguf", {"blk.0.ssm_in.weight": np.ones(64)}, 100, 10, ["text"])
    message = last_line(quantize(model, tmp_path / "run", calibration_text, "--imatrix", other, code=2))
    assert "other.gguf holds no matrix of this model" in message
    assert not (tmp_path / "run").exists()


def test_flags_that_contradict_each_other(model: Path, tmp_path: Path, calibration_text: Path) -> None:
    file = write_imatrix(tmp_path / "imatrix.gguf", {"blk.0.attn_q.weight": np.ones(64)}, 100, 10, ["text"])
    run = tmp_path / "run"
    both = quantize(model, run, calibration_text, "--imatrix", file, "--save-imatrix", file, code=2)
    assert "give --save-imatrix another name" in last_line(both)
    unused = quantize(model, run, calibration_text, "--imatrix", file, "--scale-init", "absmax", code=2)
    assert "--scale-init absmax" in last_line(unused)
    folder = quantize(model, run, calibration_text, "--save-imatrix", tmp_path, code=2)
    assert "is a folder" in last_line(folder)
    assert not run.exists()


def test_saving_for_a_family_without_names_is_refused_before_tuning(
    tmp_path: Path, tiny_llama: Path, calibration_text: Path
) -> None:
    config = transformers.OPTConfig(
        hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=3072, word_embed_proj_dim=64
    )
    model = save_random_model(config, tmp_path / "model", tokenizer_from=tiny_llama)
    result = quantize(model, tmp_path / "run", calibration_text, "--save-imatrix", tmp_path / "m.gguf", code=2)
    assert "llama.cpp has no name for model.decoder.layers.0" in last_line(result)
    assert not (tmp_path / "run").exists()


def test_interrupted_runs_and_complete_ones_save_the_same_file(
    model: Path, tmp_path: Path, calibration_text: Path
) -> None:
    whole, run = tmp_path / "whole.gguf", tmp_path / "run"
    quantize(model, run, calibration_text, "--save-imatrix", whole)
    quantize(model, run, calibration_text, "--resume", "--save-imatrix", tmp_path / "afterwards.gguf")
    assert (tmp_path / "afterwards.gguf").read_bytes() == whole.read_bytes()
    manifest = json.loads((run / "manifest.json").read_text())
    before = sha256_of(run / "manifest.json")
    for part in ("0001", "outside"):
        del manifest["complete"][part]
        (run / "blocks" / f"{part}.safetensors").unlink()
    (run / "manifest.json").write_text(json.dumps(manifest))
    quantize(model, run, calibration_text, "--resume", "--save-imatrix", tmp_path / "resumed.gguf")
    assert (tmp_path / "resumed.gguf").read_bytes() == whole.read_bytes()
    assert sha256_of(run / "manifest.json") == before


def test_reading_and_writing_files_imports_no_tuner() -> None:
    tuner = "[m for m in sys.modules if m.startswith('signround_edge.tun')]"
    code = f"import sys, exporters.gguf.imatrix.importance; print({tuner})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
