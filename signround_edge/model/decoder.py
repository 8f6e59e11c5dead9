"""A Hugging Face decoder-only model seen as: what is outside the decoder blocks, and the blocks one after another.

Parameters stay on the meta device until a block is needed, so that only one block is in memory at a time.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from signround_edge.errors import UserError
from signround_edge.model.config import read_config
from signround_edge.model.experts import Experts, replace_experts
from signround_edge.model.source import SourceModel


@dataclass(frozen=True)
class Decoder:
    """The model with meta parameters, and where its blocks are.

    Attributes:
        model: AutoModelForCausalLM; every parameter is on the meta device until loaded.
        blocks: the list of decoder blocks.
        prefix: name of that list in the model ("model.layers").
        embedding: the token embedding.
        head: the output head.
        base_prefix: name of the base model in the model ("model"); checkpoints of bare base models leave it out.
    """

    model: nn.Module
    blocks: nn.ModuleList
    prefix: str
    embedding: nn.Module
    head: nn.Module
    base_prefix: str

    def block_prefix(self, index: int) -> str:
        """ "model.layers.7." for block 7."""
        return f"{self.prefix}.{index}."

    def matrices(self, index: int) -> dict[str, nn.Module]:
        """Parameter name → module of every weight matrix (nn.Linear or GPT-2's Conv1D) of a block.

        The routers of mixtures of experts are none: they are small and decide too much to be rounded.
        """
        from transformers.pytorch_utils import Conv1D

        return {
            f"{self.block_prefix(index)}{name}.weight": module
            for name, module in self.blocks[index].named_modules()
            if isinstance(module, nn.Linear | Conv1D)
        }

    def has_experts(self) -> bool:
        """Whether it is a mixture of experts."""
        return any(isinstance(module, Experts) for module in self.blocks.modules())

    def tied_parameters(self) -> dict[str, str]:
        """Alias → owner for parameters that share data (the output head tied to the embedding)."""
        owners: dict[int, str] = {}
        tied: dict[str, str] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            if id(parameter) in owners:
                tied[name] = owners[id(parameter)]
            else:
                owners[id(parameter)] = name
        return tied


def is_transposed(module: nn.Module) -> bool:
    """Whether the module stores its weight as [in, out] (GPT-2's Conv1D) instead of [out, in]."""
    return not isinstance(module, nn.Linear | nn.Embedding)


def weight_of(module: nn.Module) -> Tensor:
    """The detached weight of a norm, linear layer or embedding, in the module's own orientation."""
    weight = module._parameters["weight"]
    assert weight is not None
    return weight.detach()


def out_in(module: nn.Module) -> Tensor:
    """The detached weight matrix as [out, in]; a view, so not contiguous where `is_transposed`."""
    weight = weight_of(module)
    return weight.T if is_transposed(module) else weight


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Within, modules are built with parameters on the meta device but real buffers (RoPE tables and the like)."""
    original = nn.Module.register_parameter

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and param.device.type != "meta":
            param = nn.Parameter(param.to("meta"), requires_grad=False)
        original(self, name, param)

    nn.Module.register_parameter = register  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


def build_decoder(config_dir: Path) -> Decoder:
    """Build the model of config_dir/config.json without weights, experts as `Experts`.

    Raises:
        UserError: no decoder-only model, or experts of an unknown form.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    read_config(config_dir)  # what is no JSON is said so
    try:
        config = AutoConfig.from_pretrained(config_dir, local_files_only=True)
        with _parameters_on_meta():
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except (ValueError, KeyError, OSError, TypeError, AttributeError, ImportError) as error:
        first = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{config_dir / 'config.json'}: transformers cannot build this architecture as a causal "
            f"language model ({first}); update transformers, or use another model"
        ) from error
    model.eval()
    model.tie_weights()
    replace_experts(model)
    prefix, blocks = _find_blocks(model, config_dir)
    return Decoder(
        model, blocks, prefix, model.get_input_embeddings(), model.get_output_embeddings(), model.base_model_prefix
    )


def _find_blocks(model: nn.Module, config_dir: Path) -> tuple[str, nn.ModuleList]:
    depth = getattr(model.config, "num_hidden_layers", None)
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if not lists:
        raise UserError(
            f"{config_dir / 'config.json'}: no list of {depth} decoder blocks found in {type(model).__name__}; "
            "only decoder-only models are supported"
        )
    return lists[0]


def load_parameters(
    module: nn.Module, prefix: str, source: SourceModel, device: torch.device, base_prefix: str
) -> None:
    """Load every parameter (and stored buffer) of `module` from the source as f32 on `device`.

    Args:
        prefix: name of the module in the model, with a final dot, or "".
        base_prefix: as in `Decoder`.
    """
    for owner_name, owner in module.named_modules():
        for leaf, parameter in list(owner._parameters.items()):
            if parameter is None:
                continue
            name = prefix + (f"{owner_name}.{leaf}" if owner_name else leaf)
            value = source.tensor(checkpoint_name(name, source, base_prefix)).to(device, torch.float32)
            if value.shape != parameter.shape:
                raise UserError(
                    f"{source.path}: tensor {name} is {list(value.shape)} but config.json asks for "
                    f"{list(parameter.shape)}; weights and config are not of the same model"
                )
            owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    module.to(device)  # buffers


def unload_parameters(module: nn.Module) -> None:
    """Give the memory of a module's parameters back: they return to the meta device."""
    for owner in module.modules():
        for leaf, parameter in owner._parameters.items():
            if parameter is not None:
                owner._parameters[leaf] = nn.Parameter(parameter.to("meta"), requires_grad=False)


# Checkpoints keep names that transformers has given up since.
_OLDER_NAMES = tuple(
    (re.compile(pattern), older)
    for pattern, older in (
        (r"^lm_head\.weight$", "embed_out.weight"),  # GPT-NeoX (Pythia)
        (r"\.mlp\.gate\.", ".block_sparse_moe.gate."),  # Mixtral, from here on
        (r"\.mlp\.experts\.(\d+)\.gate_proj\.", r".block_sparse_moe.experts.\1.w1."),
        (r"\.mlp\.experts\.(\d+)\.down_proj\.", r".block_sparse_moe.experts.\1.w2."),
        (r"\.mlp\.experts\.(\d+)\.up_proj\.", r".block_sparse_moe.experts.\1.w3."),
    )
)


def checkpoint_name(name: str, source: SourceModel, base_prefix: str) -> str:
    """The source's name of a model parameter; UserError when the source lacks it."""
    bare = name.removeprefix(f"{base_prefix}.") if base_prefix else name
    for candidate in (name, bare, f"{base_prefix}.{name}", _older_name(name), _older_name(bare)):
        if candidate in source.files:
            return candidate
    raise UserError(f"{source.path}: tensor {name} is missing from the safetensors files; download the model again")


def _older_name(name: str) -> str:
    for pattern, older in _OLDER_NAMES:
        name = pattern.sub(older, name)
    return name


def set_weight(module: nn.Module, weight: Tensor, requires_grad: bool = False) -> nn.Parameter:
    """Replace a module's weight matrix; `weight` is in the module's own orientation."""
    parameter = nn.Parameter(weight, requires_grad=requires_grad)
    module._parameters["weight"] = parameter
    return parameter


def set_out_in(module: nn.Module, weight: Tensor) -> None:
    """Replace a module's weight matrix by `weight` [out, in]: the inverse of `out_in`."""
    set_weight(module, weight.T.contiguous() if is_transposed(module) else weight)


def set_parameter(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Replace a parameter of the model by another one, without copying."""
    owner, _, leaf = name.rpartition(".")
    model.get_submodule(owner)._parameters[leaf] = parameter


def first_hidden(output: Any) -> Tensor:
    """The hidden states of a block's output, which is a tensor or a tuple that starts with it."""
    hidden: Tensor = output if isinstance(output, Tensor) else output[0]
    return hidden
