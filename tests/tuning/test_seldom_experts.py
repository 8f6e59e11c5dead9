"""Experts that hardly any token of the calibration comes to are rounded, not tuned: tuning would fit the few."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from support import SIZES, save_random_model
from transformers import MixtralConfig

from signround_edge.model.experts import split_expert
from signround_edge.progress import Progress
from signround_edge.schemes.scheme import parse_scheme
from signround_edge.tuning.quantize import quantize
from signround_edge.tuning.settings import TuningSettings

SETTINGS = TuningSettings(steps=5, samples=8, seqlen=32, batch_size=4, lr=0.02, compute_dtype="float32")
UNUSED = 4


def test_an_expert_without_tokens_keeps_the_nearest_codes_and_is_named(
    tmp_path: Path, tiny_llama: Path, calibration_text: Path
) -> None:
    config = MixtralConfig(**{**SIZES, "vocab_size": 3072}, num_local_experts=5, num_experts_per_tok=2)
    model = save_random_model(config, tmp_path / "model", tokenizer_from=tiny_llama)
    tensors = load_file(model / "model.safetensors")
    routers = [name for name in tensors if name.endswith(".gate.weight")]
    assert len(routers) == config.num_hidden_layers
    for name in routers:  # whatever the sign of the score, two of the first four have a larger one than zero
        tensors[name] = torch.tensor([1.0, -1.0, 2.0, -2.0, 0.0])[:, None] * tensors[name][:1]
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    said: list[str] = []
    scheme = parse_scheme("gguf:q4_0")
    tuned = quantize(model, scheme, tmp_path / "tuned", str(calibration_text), SETTINGS, progress=Progress(said.append))
    nearest = quantize(model, scheme, tmp_path / "nearest", str(calibration_text), replace(SETTINGS, steps=0))
    notes = [line for line in said if "fewer than 0.5% of the tokens" in line]
    assert len(notes) == config.num_hidden_layers
    assert all(f"note: 3 matrices of block {i + 1} " in line for i, line in enumerate(notes))
    changed = {True: 0, False: 0}
    for name in tuned.names():
        expert = split_expert(name)[1]
        if expert is not None:
            same = torch.equal(tuned.quantized(name).codes, nearest.quantized(name).codes)
            assert same or expert != UNUSED, name
            changed[expert == UNUSED] += not same
    assert changed[False] > 0
