"""A Hugging Face decoder-only model seen as: what is outside the decoder blocks, and the blocks one after another.

Parameters stay on the meta device until a block is needed, so that only one block is in memory at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from signround_edge.errors import UserError, first_line
from signround_edge.model.config import read_config, refuse_own_code
from signround_edge.model.experts import ExpertPart, Experts, replace_experts
from signround_edge.model.language_model import decoder_of, reads_more_than_text, text_config, whole_model_class
from signround_edge.model.linear_layers import matrices_of
from signround_edge.model.transformers_quiet import transformers_quiet


@dataclass(frozen=True)
class Decoder:
    """The model with meta parameters, and where its blocks are.

    Attributes:
        model: AutoModelForCausalLM; every parameter is on the meta device until loaded.
        blocks: the list of decoder blocks.
        prefix: name of that list in the model ("model.layers").
        embedding: the token embedding.
        lookups: parameter name → module of every table that is looked up by token: the token embedding first, and
            others beside it (the per-layer embeddings of Gemma 3n and 4).
        head: the output head.
        stored: name → shape of what transformers saves and loads of this model, parameters and buffers, under its own
            names: those of the model, but for experts.
        experts: parameter name of an expert's matrix → where it is in `stored`.
        matrix_names: parameter names of the blocks' weight matrices; see `linear_layers`.
    """

    model: nn.Module
    blocks: nn.ModuleList
    prefix: str
    embedding: nn.Module
    lookups: dict[str, nn.Module]
    head: nn.Module
    stored: dict[str, tuple[int, ...]]
    experts: dict[str, ExpertPart]
    matrix_names: frozenset[str]

    def block_prefix(self, index: int) -> str:
        """ "model.layers.7." for block 7."""
        return f"{self.prefix}.{index}."

    def matrices(self, index: int) -> dict[str, nn.Module]:
        """Parameter name → module of every weight matrix (nn.Linear or GPT-2's Conv1D) of a block; no routers."""
        every = {f"{self.block_prefix(index)}{name}.weight": m for name, m in self.blocks[index].named_modules()}
        return {name: module for name, module in every.items() if name in self.matrix_names}

    def stored_buffers(self) -> dict[str, Tensor]:
        """Name → initial value of every buffer that belongs to a checkpoint (RoPE tables and the like do not)."""
        return {name: buffer for name, buffer in self.model.named_buffers() if name in self.stored}

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
    model: Any = transformers_model(config_dir)
    stored = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    experts = replace_experts(model)
    prefix, blocks = find_blocks(model)
    matrices = matrices_of(model, blocks, prefix)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    lookups = find_lookups(model, embedding, set(blocks.modules()))
    return Decoder(model, blocks, prefix, embedding, lookups, head, stored, experts, matrices)


def find_lookups(model: nn.Module, embedding: nn.Module, blocks: set[nn.Module]) -> dict[str, nn.Module]:
    """The token embedding, and what else outside the blocks has a row for each token (learned positions have not)."""
    config: Any = model.config
    rows = {len(weight_of(embedding)), getattr(config, "vocab_size_per_layer_input", None)}
    every = {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and module.num_embeddings in rows and module not in blocks
    }
    return dict(sorted(every.items(), key=lambda item: item[1] is not embedding))


def transformers_model(config_dir: Path) -> nn.Module:
    """transformers' own causal language model of config_dir/config.json, parameters on the meta device.

    Of a model that reads more than text it is the language model inside, built alone.

    Raises:
        UserError: transformers knows no causal language model of this kind.
    """
    from transformers import AutoModelForCausalLM

    model = whole_model(config_dir)
    if reads_more_than_text(model.config):
        model = _built(config_dir, AutoModelForCausalLM, text_config(model.config, _is_tied(model)))
    built: nn.Module = model
    return built


def whole_model(config_dir: Path) -> Any:
    """transformers' model of config_dir/config.json as it is, towers for images and sound included, on the meta device.

    Raises:
        UserError: transformers knows no such model.
    """
    from transformers import AutoConfig

    read_config(config_dir)  # what is no JSON is said so
    with _said(config_dir), transformers_quiet():
        config = AutoConfig.from_pretrained(config_dir, local_files_only=True, trust_remote_code=False)
        config.quantization_config = None  # dequantized as it is loaded
    return _built(config_dir, whole_model_class(config), config)


def _built(config_dir: Path, auto_class: Any, config: Any) -> Any:
    with _said(config_dir), transformers_quiet(), _parameters_on_meta():
        model: Any = auto_class.from_config(config, dtype=torch.float32, trust_remote_code=False)
    model.tie_weights()
    return model.eval()


def _is_tied(model: Any) -> bool:
    return bool(model.get_input_embeddings().weight is model.get_output_embeddings().weight)


@contextlib.contextmanager
def _said(config_dir: Path) -> Iterator[None]:
    """Within, what transformers raises on a config that it cannot build becomes one sentence."""
    try:
        yield
    except (ValueError, KeyError, OSError, TypeError, AttributeError, ImportError) as error:
        refuse_own_code(config_dir, error)
        raise UserError(
            f"{config_dir / 'config.json'}: transformers cannot build this architecture as a causal "
            f"language model ({first_line(error)[:200]}); update transformers, or use another model"
        ) from error


def find_blocks(model: Any) -> tuple[str, nn.ModuleList]:
    """(name, list) of the decoder blocks of transformers' model, also of one that reads more than text.

    Raises:
        UserError: it has no list of as many blocks as its config says.
    """
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    if depth == 0:
        raise UserError(f"the config of this {type(model).__name__} says num_hidden_layers 0; give a model with blocks")
    inside = set(decoder_of(model).modules())
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth and module in inside:
            return name, module
    raise UserError(
        f"no list of {depth} decoder blocks found in {type(model).__name__}; only decoder-only models are supported"
    )


def unload_parameters(module: nn.Module) -> None:
    """Give the memory of a module's parameters back: they return to the meta device."""
    for owner in module.modules():
        for leaf, parameter in owner._parameters.items():
            if parameter is not None:
                owner._parameters[leaf] = nn.Parameter(parameter.to("meta"), requires_grad=False)


def set_weight(module: nn.Module, weight: Tensor, requires_grad: bool = False) -> nn.Parameter:
    """Replace a module's weight matrix; `weight` is in the module's own orientation."""
    parameter = nn.Parameter(weight, requires_grad=requires_grad)
    module._parameters["weight"] = parameter
    return parameter


def set_out_in(module: nn.Module, weight: Tensor) -> None:
    """Replace a module's weight matrix by `weight` [out, in]: the inverse of `out_in`."""
    set_weight(module, weight.T.contiguous() if is_transposed(module) else weight)


def set_tensor(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Replace a parameter or a buffer of the model by another tensor of its kind, without copying.

    A parameter that is no `nn.Parameter` yet becomes one that takes no gradient.
    """
    owner_name, _, leaf = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    buffer = owner._buffers.get(leaf)
    if buffer is not None:
        owner._buffers[leaf] = tensor.to(buffer.dtype)
    else:
        owner._parameters[leaf] = as_parameter(tensor)


def as_parameter(tensor: Tensor) -> nn.Parameter:
    """The parameter itself, or a tensor as one that takes no gradient."""
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)


def first_hidden(output: Any) -> Tensor:
    """The hidden states of a block's output, which is a tensor or a tuple that starts with it."""
    hidden: Tensor = output if isinstance(output, Tensor) else output[0]
    return hidden
