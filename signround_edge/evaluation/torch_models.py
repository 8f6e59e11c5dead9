"""Models in torch to compare with: the original and a run's, both transformers' own, and neither built by our loader.

What tuning reads wrong would otherwise be read wrong here too, and be proved right.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from signround_edge.errors import UserError, first_line
from signround_edge.model.decoder import transformers_model, whole_model
from signround_edge.model.experts import fused_experts, replace_experts
from signround_edge.model.language_model import name_of, whole_model_class
from signround_edge.model.matching import match_names
from signround_edge.model.missing import missing_tensors
from signround_edge.model.source import SourceModel
from signround_edge.model.stored_quantized import dequantizing_settings
from signround_edge.model.transformers_quiet import transformers_quiet
from signround_edge.run_directory import RunDirectory


def load_source_model(
    path: Path, device: str = "cpu", offload: Path | None = None, memory: int | None = None
) -> nn.Module:
    """The full-precision model of a Hugging Face folder by `from_pretrained`, f32, in evaluation mode.

    Args:
        offload: a folder for what does not fit in `memory` bytes: those weights are read from disk when needed.
    Raises:
        UserError: a file is missing or broken, or transformers finds no data for a tensor of the model.
    """
    from transformers import AutoConfig

    # What is missing or broken, or stored in integers, is said in our words.
    source = SourceModel.open(path)
    unused = match_names(source, whole_model(path)).unused
    options: dict[str, Any] = {}
    if (settings := dequantizing_settings(path)) is not None:
        options["quantization_config"] = settings
    if offload is not None:
        options |= {"device_map": "auto", "max_memory": {"cpu": memory}, "offload_folder": offload}
    try:
        with transformers_quiet():
            config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
            auto_class = whole_model_class(config)
            model, info = auto_class.from_pretrained(
                path,
                dtype=torch.float32,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
                **options,
            )
    except (ValueError, KeyError, OSError, TypeError, AttributeError, RuntimeError, ImportError) as error:
        raise UserError(
            f"{path}: transformers cannot load this model ({first_line(error)[:200]}); check the folder's files"
        ) from error
    if info["missing_keys"]:
        head = f"{name_of(model, model.get_output_embeddings())}.weight"
        raise missing_tensors(source, sorted(info["missing_keys"]), unused, head)
    loaded: nn.Module = model.requires_grad_(False).eval()
    return loaded if offload is not None else loaded.to(device)


def load_run_model(run: RunDirectory, device: str = "cpu", config_dir: Path | None = None) -> nn.Module:
    """transformers' model with the tensors of a run directory, dequantized, f32, in evaluation mode.

    Args:
        config_dir: a folder with another config.json of the same tensors than the run's own.
    Raises:
        UserError: the run lacks a tensor of the model, or has one that the model does not know.
    """
    config_dir = config_dir or run.config_dir
    model: Any = transformers_model(config_dir)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    parts = replace_experts(transformers_model(config_dir))  # of a second one, to learn where each belongs
    tensors = fused_experts(dict(run.state_dict()), parts, shapes)
    missing, unexpected = model.load_state_dict(tensors, strict=False, assign=True)
    if unexpected:
        raise UserError(f"{run.path}: {type(model).__name__} has no tensor {unexpected[0]}; run `quantize` again")
    model.tie_weights()
    _refuse_missing(run.path, {name for name in missing if name not in run.manifest.tied})
    loaded: nn.Module = model.requires_grad_(False).to(device).eval()
    return loaded


def _refuse_missing(path: Path, names: set[str]) -> None:
    if names:
        raise UserError(
            f"{path}: no data for tensor {min(names)} ({len(names)} in all); weights and config are not of the same "
            "model"
        )
