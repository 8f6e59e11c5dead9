"""A checkpoint that was trained on a grid is stored as it is, and weights that no scale can hold are named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from gguf import GGUFReader, dequantize
from safetensors.torch import load_file, save_file
from support import save_random_model

from exporters.gguf import GgufExporter
from exporters.interface import ExportOptions
from signround_edge.inspection import inspect
from signround_edge.progress import Progress
from signround_edge.run_directory import RunDirectory
from signround_edge.schemes.scheme import parse_scheme
from signround_edge.tuning.quantize import quantize
from signround_edge.tuning.settings import TuningSettings
from tests import support

SIZES = {**support.SIZES, "vocab_size": 3072}
SETTINGS = TuningSettings(steps=20, samples=16, seqlen=32, batch_size=4, lr=0.02, compute_dtype="float32")


def on_q4_0(shape: torch.Size, dtype: torch.dtype, positive: bool) -> torch.Tensor:
    codes = torch.randint(-8, 8, (shape[0], shape[1] // 32, 32))
    scale = (torch.rand(shape[0], shape[1] // 32, 1) * 0.05 + 0.01).bfloat16().float()
    if not positive:
        scale = scale * torch.where(torch.rand(scale.shape) < 0.5, -1.0, 1.0)
    return (codes * scale).reshape(shape).to(dtype)


def make(config: transformers.PretrainedConfig, out: Path, tokenizer: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    save_random_model(config, out, tokenizer_from=tokenizer)
    return out / "model.safetensors", load_file(out / "model.safetensors")


def tune(model: Path, out: Path, text: Path, settings: TuningSettings = SETTINGS) -> tuple[RunDirectory, list[str]]:
    lines: list[str] = []
    run = quantize(model, parse_scheme("gguf:q4_0"), out, str(text), settings, progress=Progress(lines.append))
    return run, lines


@pytest.mark.parametrize("positive", [True, False], ids=["positive", "signed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_checkpoint_trained_on_the_grid_keeps_its_weights(
    dtype: torch.dtype, positive: bool, tmp_path: Path, tiny_llama: Path, calibration_text: Path
) -> None:
    """Tuned, with inputs that an embedding on another grid has changed; read by gguf-py from the file."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=False)
    file, tensors = make(config, tmp_path / "model", tiny_llama)
    inside = [name for name, tensor in tensors.items() if tensor.ndim == 2 and ".layers." in name]
    changed = {name: on_q4_0(tensors[name].shape, dtype, positive) for name in inside}
    save_file({**{k: t.to(dtype) for k, t in tensors.items()}, **changed}, file, metadata={"format": "pt"})
    run, lines = tune(tmp_path / "model", tmp_path / "run", calibration_text)
    assert f"{len(inside)} of {len(inside) + 2} matrices lie on this grid already; stored as they are" in lines
    GgufExporter().export(run, tmp_path / "a.gguf", ExportOptions(log=lambda line: None))
    stored = {t.name: dequantize(t.data, t.tensor_type) for t in GGUFReader(tmp_path / "a.gguf").tensors}
    for name in inside:
        if "q_proj" in name or "k_proj" in name:
            continue  # their rows have another order in the file
        _, _, block, _, matrix, _ = name.split(".")
        theirs = {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}.get(matrix)
        theirs = theirs or {"v_proj": "attn_v", "o_proj": "attn_output"}[matrix]
        found, source = stored[f"blk.{block}.{theirs}.weight"], changed[name].float().numpy()
        tolerance = 0 if dtype is torch.float32 else torch.finfo(dtype).eps
        assert np.all(np.abs(found - source) <= tolerance * np.abs(source)), name


def test_other_matrices_of_a_block_are_tuned_and_those_on_the_grid_stay(
    tmp_path: Path, tiny_llama: Path, calibration_text: Path
) -> None:
    torch.manual_seed(0)
    file, tensors = make(transformers.LlamaConfig(**SIZES), tmp_path / "model", tiny_llama)
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name] = on_q4_0(tensors[name].shape, torch.float32, positive=False)
    save_file(tensors, file, metadata={"format": "pt"})
    run, lines = tune(tmp_path / "model", tmp_path / "run", calibration_text)
    assert torch.equal(run.dequantized(name), tensors[name])
    assert any("1 of 16 matrices lie on this grid already" in line for line in lines)
    nearest, _ = tune(tmp_path / "model", tmp_path / "nearest", calibration_text, TuningSettings(steps=0, samples=16))
    other = "model.layers.1.mlp.up_proj.weight"
    assert not torch.equal(run.dequantized(other), nearest.dequantized(other))


def test_an_ordinary_checkpoint_gets_no_line(tmp_path: Path, tiny_llama: Path, calibration_text: Path) -> None:
    _, lines = tune(tiny_llama, tmp_path / "run", calibration_text, TuningSettings(steps=0, samples=2, seqlen=32))
    assert not [line for line in lines if "grid" in line or "warning" in line]


def test_weights_that_fp16_scales_cannot_hold_are_named_with_their_share(
    tmp_path: Path, tiny_llama: Path, calibration_text: Path
) -> None:
    """Also of matrices that are stored transposed."""
    config = transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=3072)
    file, tensors = make(config, tmp_path / "model", tiny_llama)
    small = next(name for name in tensors if name.endswith("h.1.mlp.c_fc.weight"))
    large = next(name for name in tensors if name.endswith("h.0.mlp.c_fc.weight"))
    tensors[small] = tensors[small] * 1e-8
    tensors[large][3, 7] = 1e7
    save_file(tensors, file, metadata={"format": "pt"})
    settings = TuningSettings(steps=0, samples=2, seqlen=32)
    run, lines = tune(tmp_path / "model", tmp_path / "run", calibration_text, settings)
    warned = {line.split(": ")[1]: line for line in lines if line.startswith("warning")}
    assert len(warned) == 2
    assert any(small in name and "(100 %) became zero" in line for name, line in warned.items())
    assert any(large in name and "1 of 16384 weights (0.0061 %) were cut off" in line for name, line in warned.items())
    (name,) = [name for name in run.names() if name.endswith("h.1.mlp.c_fc.weight")]
    assert not run.dequantized(name).any()


def test_zeros_say_nothing_of_the_grid(tmp_path: Path, tiny_llama: Path, calibration_text: Path) -> None:
    file, tensors = make(transformers.LlamaConfig(**SIZES), tmp_path / "model", tiny_llama)
    name = "model.layers.1.mlp.down_proj.weight"
    save_file({**tensors, name: torch.zeros_like(tensors[name])}, file, metadata={"format": "pt"})
    run, lines = tune(tmp_path / "model", tmp_path / "run", calibration_text)
    assert not run.dequantized(name).any()
    assert not any("grid already" in line for line in lines)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_inspect_names_floats_as_the_file_will_hold_them(
    dtype: torch.dtype, tmp_path: Path, tiny_llama: Path, calibration_text: Path
) -> None:
    file, tensors = make(transformers.LlamaConfig(**SIZES), tmp_path / "model", tiny_llama)
    save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
    run, _ = tune(tmp_path / "model", tmp_path / "run", calibration_text)
    norms = {t.type: t.bytes // t.shape[0] for t in inspect(run.path).tensors if "norm" in t.name}
    assert norms == {"float32": 4}
