"""The checkpoint that the model builder reads: one of stand-ins in Olive's layout, or a plain one in f32.

Olive's layout (onnxruntime_genai/models/loaders/olive.py, 0.18.0), for a linear layer `<base>` of shape [N, K]:
`<base>.qweight` uint8 [N, K·bits/8], `<base>.scales` [N, K/g], `<base>.qzeros` uint8 [N, ceil(K/g·bits/8)], and in
config.json `quantization_config` with an override of bits and group size per layer. Zero points are always written:
without them the builder crashes when it packs Q, K and V. The head is always written quantized, as the builder would
otherwise round it by itself.

The builder makes the graph and nothing else, so each matrix is a stand-in whose rows are one block long, and the passes
put the run's operands in its place: the builder holds a whole model in memory, several times over, and the integers
would only pass through it. The number of rows is the real one, since widths in the graph come from it. All scales of a
stand-in are its parameter's number, by which the exporter sees that every matrix is where it belongs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from safetensors.torch import save_file
from torch import Tensor

from exporters.onnx.bindings import OPERAND_WORDS, Binding
from exporters.onnx.builder_names import EMBEDDING, HEAD, decoder_config
from exporters.onnx.routes.graph import copy_config_files
from exporters.onnx.run_weights import RunWeights
from signround_edge.errors import CheckFailed
from signround_edge.formats import get_grid
from signround_edge.formats.matmul_nbits import ONNX_BLOCKS, matmul_nbits_container
from signround_edge.model.config import CONFIG_FILE
from signround_edge.run_directory import RunDirectory

_PLACEHOLDER_BITS = 8


def write_stand_in_checkpoint(weights: RunWeights, folder: Path) -> None:
    """Write the checkpoint at `folder`: stand-ins of the matrices, and norm weights and biases as they are.

    The embedding has the shape [1, 1]; the builder never looks at its values.
    """
    run = weights.run
    overrides: dict[str, dict[str, int]] = {}
    numbers = _numbers(run)
    copy_config_files(run, folder)  # config.json is replaced below
    tensors: dict[str, Tensor] = {}
    for name in run.names():
        shape = run.entry(name).shape
        if name == EMBEDDING:
            tensors[name] = torch.zeros(1, 1)
        elif len(shape) == 2:
            overrides[name.removesuffix(".weight")] = _stage_matrix(weights, name, numbers[name], tensors)
        else:
            tensors[name] = run.float_tensor(name).float().contiguous()
    if HEAD in run.manifest.tied:
        overrides["lm_head"] = _stage_matrix(weights, HEAD, numbers[HEAD], tensors)
    save_file(tensors, folder / "model.safetensors")
    quantization = {"quant_method": "olive", "bits": 4, "group_size": 32, "symmetric": False, "overrides": overrides}
    _write_config({**decoder_config(run.config), "quantization_config": quantization}, folder)


def write_float_checkpoint(run: RunDirectory, folder: Path) -> None:
    """Write the run's dequantized weights in f32 as a plain Hugging Face checkpoint, one file per part of the run."""
    copy_config_files(run, folder)  # config.json is replaced below
    index: dict[str, str] = {}
    for part in run.manifest.parts:
        file = f"model-{part}.safetensors"
        tensors = {name: run.dequantized(name).contiguous() for name in _names_of_part(run, part)}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    # Without the dtype here transformers would load the f32 tensors in the source model's dtype.
    _write_config({**decoder_config(run.config), "dtype": "float32", "torch_dtype": "float32"}, folder)


def can_pack_qkv(run: RunDirectory) -> bool:
    """Whether the builder may pack Q, K and V: not where one of them is kept in floats and another is quantized."""
    attention: dict[str, set[bool]] = {}
    for name in run.names():
        base, _, projection = name.rpartition(".self_attn.")
        if projection in ("q_proj.weight", "k_proj.weight", "v_proj.weight"):
            attention.setdefault(base, set()).add(run.is_quantized(name))
    return all(len(kinds) == 1 for kinds in attention.values())


def check_stand_ins(graph: ir.Graph, bindings: list[Binding], weights: RunWeights) -> None:
    """CheckFailed unless every stand-in is where its parameter's operands belong, as the builder was given it."""
    numbers, nodes = _numbers(weights.run), {node.name: node for node in graph}
    for binding in bindings:
        rows = [weights.run.entry(weights.owner(p)).shape[0] for p in binding.parameters]
        node, container = nodes[binding.node], _container(weights, binding.parameters[0])
        found = tuple(node.attributes[name].as_int() for name in ("bits", "block_size"))
        for role, what in OPERAND_WORDS.items():
            stored = graph.initializers[binding.initializers[role]].const_value.numpy().reshape(-1)
            wanted = np.repeat([float(numbers[p]) for p in binding.parameters], rows)
            wanted = wanted if role == "scales" else np.zeros(len(stored) // len(wanted) * len(wanted))
            differing = int(np.count_nonzero(stored != wanted)) if len(stored) == len(wanted) else len(stored)
            if differing or found != container:
                raise CheckFailed(
                    f"{what} of tensor {binding.title} in node {binding.node} differ from what the graph "
                    f"builder was given in {differing} of {len(stored)} values ({found[0]} bits, blocks of {found[1]})"
                )


def _numbers(run: RunDirectory) -> dict[str, int]:
    """Parameter → the number that its stand-in carries as its scale: from 1, in model order, a tied head last."""
    return {name: number for number, name in enumerate([*run.names(), HEAD], start=1)}


def _container(weights: RunWeights, name: str) -> tuple[int, int]:
    """(bits, block size) of a matrix's stand-in: those of its operands; any for one that the run keeps in floats."""
    format_ = weights.run.entry(weights.owner(name)).format
    container = None if format_ is None else matmul_nbits_container(get_grid(format_))
    return container or (_PLACEHOLDER_BITS, ONNX_BLOCKS[0])


def _stage_matrix(weights: RunWeights, name: str, number: int, tensors: dict[str, Tensor]) -> dict[str, int]:
    """Add one matrix's stand-in and return its override of bits and group size."""
    base = name.removesuffix(".weight")
    bits, block_size = _container(weights, name)
    rows = weights.run.entry(weights.owner(name)).shape[0]
    tensors[f"{base}.qweight"] = torch.zeros(rows, block_size * bits // 8, dtype=torch.uint8)
    tensors[f"{base}.scales"] = torch.full((rows, 1), float(number))
    tensors[f"{base}.qzeros"] = torch.zeros(rows, 1, dtype=torch.uint8)
    return {"bits": bits, "group_size": block_size}


def _names_of_part(run: RunDirectory, part: str) -> Iterator[str]:
    return (name for name in run.names() if run.entry(name).part == part)


def _write_config(config: dict[str, Any], folder: Path) -> None:
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=1), encoding="utf-8")
