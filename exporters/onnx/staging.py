"""The checkpoint that the model builder reads: a pre-quantized one in Olive's layout, or a plain one in f32.

Olive's layout (onnxruntime_genai/models/loaders/olive.py, 0.18.0), for a linear layer `<base>` of shape [N, K]:
`<base>.qweight` uint8 [N, K·bits/8], `<base>.scales` [N, K/g], `<base>.qzeros` uint8 [N, ceil(K/g·bits/8)], and in
config.json `quantization_config` with an override of bits and group size per layer. That is MatMulNBits' own bit order,
so writing it is a reshape. Zero points are always written: without them the builder crashes when it packs Q, K and V.
The head is always written quantized, as the builder would otherwise round it by itself.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from exporters.onnx.families import EMBEDDING, HEAD, decoder_config
from exporters.onnx.run_weights import RunWeights
from signround_edge.run_directory import RunDirectory

_PLACEHOLDER_BITS = 8


def write_olive_checkpoint(weights: RunWeights, config: dict[str, Any], folder: Path) -> None:
    """Write a pre-quantized checkpoint of the run at `folder`, one file per part of the run.

    Matrices that the run keeps in floats get a placeholder of zeros with one block a row, and the embedding one of
    shape [1, 1] (the builder never looks at its values); the passes put the real ones into the graph.
    """
    run = weights.run
    overrides: dict[str, dict[str, int]] = {}
    _copy_config(run, folder)
    for part in run.manifest.parts:
        tensors: dict[str, Tensor] = {}
        for name in _names_of_part(run, part):
            shape = run.entry(name).shape
            if name == EMBEDDING:
                tensors[name] = torch.zeros(1, 1)
                if HEAD in run.manifest.tied:
                    overrides["lm_head"] = _stage_matrix(weights, HEAD, tensors)
            elif len(shape) == 2:
                overrides[name.removesuffix(".weight")] = _stage_matrix(weights, name, tensors)
            else:
                tensors[name] = run.float_tensor(name).float()
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / f"model-{part}.safetensors")
    quantization = {"quant_method": "olive", "bits": 4, "group_size": 32, "symmetric": False, "overrides": overrides}
    _write_config({**decoder_config(config), "quantization_config": quantization}, folder)


def write_float_checkpoint(run: RunDirectory, config: dict[str, Any], folder: Path) -> None:
    """Write the run's dequantized weights in f32 as a plain Hugging Face checkpoint, one file per part of the run."""
    _copy_config(run, folder)
    index: dict[str, str] = {}
    for part in run.manifest.parts:
        file = f"model-{part}.safetensors"
        tensors = {name: run.dequantized(name).contiguous() for name in _names_of_part(run, part)}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    # Without the dtype here transformers would load the f32 tensors in the source model's dtype.
    _write_config({**decoder_config(config), "dtype": "float32", "torch_dtype": "float32"}, folder)


def can_pack_qkv(run: RunDirectory) -> bool:
    """Whether the builder may pack Q, K and V: not where one of them is kept in floats and another is quantized."""
    attention: dict[str, set[bool]] = {}
    for name in run.names():
        base, _, projection = name.rpartition(".self_attn.")
        if projection in ("q_proj.weight", "k_proj.weight", "v_proj.weight"):
            attention.setdefault(base, set()).add(run.is_quantized(name))
    return all(len(kinds) == 1 for kinds in attention.values())


def _stage_matrix(weights: RunWeights, name: str, tensors: dict[str, Tensor]) -> dict[str, int]:
    """Add one matrix's tensors in Olive's layout and return its override of bits and group size."""
    base = name.removesuffix(".weight")
    if not weights.is_quantized((name,)):
        rows, cols = weights.run.entry(weights.owner(name)).shape
        tensors[f"{base}.qweight"] = torch.zeros(rows, cols, dtype=torch.uint8)
        tensors[f"{base}.scales"] = torch.zeros(rows, 1)
        tensors[f"{base}.qzeros"] = torch.zeros(rows, 1, dtype=torch.uint8)
        return {"bits": _PLACEHOLDER_BITS, "group_size": cols}
    operands = weights.operands((name,))
    tensors[f"{base}.qweight"] = torch.from_numpy(operands.weight.reshape(operands.weight.shape[0], -1))
    tensors[f"{base}.scales"] = torch.from_numpy(operands.scales)
    tensors[f"{base}.qzeros"] = torch.from_numpy(np.ascontiguousarray(operands.zero_points))
    return {"bits": operands.bits, "group_size": operands.block_size}


def _names_of_part(run: RunDirectory, part: str) -> Iterator[str]:
    return (name for name in run.names() if run.entry(name).part == part)


def _copy_config(run: RunDirectory, folder: Path) -> None:
    folder.mkdir(parents=True)
    for file in sorted(run.config_dir.iterdir()):
        if file.is_file() and file.name != "config.json":
            shutil.copyfile(file, folder / file.name)


def _write_config(config: dict[str, Any], folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
