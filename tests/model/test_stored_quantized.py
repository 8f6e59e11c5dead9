"""Checkpoints stored in fp8 and MXFP4 are tuned from the floats that transformers makes of them; others are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from signround_edge.errors import UserError
from signround_edge.evaluation.torch_models import load_source_model
from signround_edge.model.weights import ModelWeights
from signround_edge.schemes.scheme import parse_scheme
from signround_edge.tuning.quantize import quantize
from signround_edge.tuning.settings import TuningSettings
from tests import support
from tests.support import save_random_model

SIZES: dict[str, Any] = {**support.SIZES, "vocab_size": 3072, "initializer_range": 0.1}
ROUND = TuningSettings(steps=0, samples=4, seqlen=32, batch_size=2)


def rewrite(model: Path, tensors: dict[str, Tensor], quantization: dict[str, Any]) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def fp8_model(folder: Path, tokenizer: Path) -> dict[str, Tensor]:
    """A Llama with matrices in fp8, each 32 × 32 values with a scale; returns the weights that are meant."""
    save_random_model(transformers.LlamaConfig(**SIZES), folder, tokenizer_from=tokenizer)
    tensors = load_file(folder / "model.safetensors")
    meant: dict[str, Tensor] = {}
    for name in [name for name in tensors if "_proj.weight" in name]:
        rows, cols = tensors[name].shape
        blocks = tensors[name].view(rows // 32, 32, cols // 32, 32)
        scales = blocks.abs().amax(dim=(1, 3)) / 448
        stored = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
        meant[name] = (stored.float() * scales[:, None, :, None]).view(rows, cols)
        tensors[name], tensors[f"{name}_scale_inv"] = stored.view(rows, cols), scales
    rewrite(folder, tensors, {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic"})
    return meant


def mxfp4_model(folder: Path, tokenizer: Path) -> dict[str, Tensor]:
    """gpt-oss with experts in MXFP4 (random nibbles, exponents around 2⁻⁴); returns the weights that are meant."""
    config = transformers.GptOssConfig(
        **SIZES, num_local_experts=4, num_experts_per_tok=2, head_dim=16, layer_types=["full_attention"] * 2
    )
    save_random_model(config, folder, tokenizer_from=tokenizer)
    tensors, generator = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(0)
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
    meant: dict[str, Tensor] = {}
    for layer in range(2):
        for leaf in ("gate_up_proj", "down_proj"):
            name = f"model.layers.{layer}.mlp.experts.{leaf}"
            experts, cols, rows = tensors.pop(name).shape
            packed = torch.randint(0, 256, (experts, rows, cols // 32, 16), generator=generator, dtype=torch.uint8)
            scales = torch.randint(121, 124, (experts, rows, cols // 32), generator=generator, dtype=torch.uint8)
            pairs = torch.stack([values[(packed & 15).long()], values[(packed >> 4).long()]], dim=-1)
            weights = pairs.flatten(-2) * 2.0 ** (scales.float() - 127)[..., None]
            meant[name] = weights.flatten(-2).transpose(1, 2)
            tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = packed, scales
    rewrite(folder, tensors, {"quant_method": "mxfp4", "modules_to_not_convert": []})
    return meant


def test_fp8_is_dequantized(tmp_path: Path, tiny_llama: Path, calibration_text: Path) -> None:
    meant = fp8_model(tmp_path / "model", tiny_llama)
    weights, theirs = ModelWeights.open(tmp_path / "model"), load_source_model(tmp_path / "model")
    for name, expected in meant.items():
        assert torch.equal(theirs.get_parameter(name), expected), name
        assert torch.equal(weights.tensor(name).float(), expected), name
    run = quantize(tmp_path / "model", parse_scheme("gguf:q8_0"), tmp_path / "run", str(calibration_text), ROUND)
    assert run.manifest.source_check is not None
    assert run.manifest.source_check["error"] < 1e-6
    assert "quantization_config" not in run.config


def test_mxfp4_is_dequantized(tmp_path: Path, tiny_llama: Path, calibration_text: Path) -> None:
    meant = mxfp4_model(tmp_path / "model", tiny_llama)
    weights, theirs = ModelWeights.open(tmp_path / "model"), load_source_model(tmp_path / "model")
    for name, expected in meant.items():
        assert torch.equal(theirs.get_parameter(name), expected), name
    stem = "model.layers.1.mlp.experts"
    up, down = weights.tensor(f"{stem}.3.up_proj.weight"), weights.tensor(f"{stem}.3.down_proj.weight")
    assert torch.equal(up.float(), meant[f"{stem}.gate_up_proj"][3, :, 1::2].T)
    assert torch.equal(down.float(), meant[f"{stem}.down_proj"][3].T)
    run = quantize(tmp_path / "model", parse_scheme("gguf:q4_0"), tmp_path / "run", str(calibration_text), ROUND)
    assert run.manifest.source_check is not None
    assert run.manifest.source_check["error"] < 1e-6


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "compressed-tensors"])
def test_integers_of_others_are_refused(method: str, tmp_path: Path) -> None:
    save_random_model(transformers.LlamaConfig(**SIZES), tmp_path)
    rewrite(tmp_path, load_file(tmp_path / "model.safetensors"), {"quant_method": method, "bits": 4})
    for load in (ModelWeights.open, load_source_model):
        with pytest.raises(UserError, match=rf"quantized already \({method}\); quantize the original model"):
            load(tmp_path)


def test_integers_that_no_config_speaks_of_are_refused(tmp_path: Path) -> None:
    save_random_model(transformers.LlamaConfig(**SIZES), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file(
        {**tensors, name: tensors[name].to(torch.int8)}, tmp_path / "model.safetensors", metadata={"format": "pt"}
    )
    with pytest.raises(UserError, match=rf"{name} is stored as I8, so this checkpoint is quantized already"):
        ModelWeights.open(tmp_path)


@pytest.mark.parametrize("other_name", [None, "weight_scale"])
@pytest.mark.parametrize("leaf", ["layers.1.mlp.up_proj", "embed_tokens", "norm"])
def test_fp8_without_the_scale_that_transformers_reads_is_refused(
    leaf: str, other_name: str | None, tmp_path: Path, tiny_llama: Path
) -> None:
    fp8_model(tmp_path, tiny_llama)
    name, tensors = f"model.{leaf}.weight", load_file(tmp_path / "model.safetensors")
    scales = tensors.pop(f"{name}_scale_inv", torch.ones(()))
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    if other_name is not None:
        tensors[f"model.{leaf}.{other_name}"] = scales
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    seen = "" if other_name is None else rf" \({name}_scale is there, which transformers does not read\)"
    for load in (ModelWeights.open, load_source_model):
        with pytest.raises(
            UserError, match=rf"{name} is stored as F8_E4M3, but its scale {name}_scale_inv is missing{seen};"
        ):
            load(tmp_path)


def test_mxfp4_without_scales_is_refused(tmp_path: Path, tiny_llama: Path) -> None:
    mxfp4_model(tmp_path, tiny_llama)
    stem, tensors = "model.layers.1.mlp.experts.down_proj", load_file(tmp_path / "model.safetensors")
    del tensors[f"{stem}_scales"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"{stem}_blocks is stored as U8, but its scale {stem}_scales is missing"):
        ModelWeights.open(tmp_path)


def test_mxfp4_that_no_config_speaks_of_is_refused(tmp_path: Path, tiny_llama: Path) -> None:
    mxfp4_model(tmp_path, tiny_llama)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    for load in (ModelWeights.open, load_source_model):
        with pytest.raises(
            UserError, match=r"experts\.\w+_blocks is stored as U8, so this checkpoint is quantized already"
        ):
            load(tmp_path)


def test_nan_in_fp8_is_nan(tmp_path: Path, tiny_llama: Path) -> None:
    fp8_model(tmp_path, tiny_llama)
    name, tensors = "model.layers.1.mlp.up_proj.weight", load_file(tmp_path / "model.safetensors")
    tensors[name].view(torch.uint8)[3, 5] = 0x7F
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"{name} holds NaN or infinity"):
        ModelWeights.open(tmp_path).tensor(name)


def test_settings_that_are_no_object_are_refused(tmp_path: Path) -> None:
    save_random_model(transformers.LlamaConfig(**SIZES), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": "gptq"}))
    for load in (ModelWeights.open, load_source_model):
        with pytest.raises(UserError, match=r"its quantization_config is 'gptq' and no JSON object; remove the entry"):
            load(tmp_path)
