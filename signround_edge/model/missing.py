"""Why a tensor of the model is not in its folder, in a sentence that names the tool or the kind of checkpoint."""

from __future__ import annotations

import re

from signround_edge.errors import UserError
from signround_edge.model.config import read_config
from signround_edge.model.source import SourceModel, is_float, type_name

# What tools leave in the names of a model's tensors: in front of them, or in front of a block's or a module's.
_WRAPPERS = {
    "base_model.model.": "PEFT",
    "_orig_mod.": "torch.compile",
    "_fsdp_wrapped_module.": "FSDP",
    "_checkpoint_wrapped_module.": "torch's checkpoint wrapper",
    "module.": "torch's DistributedDataParallel",
}
_WRAPPER = re.compile("|".join(rf"(?:^|(?<=\.)){re.escape(part)}" for part in _WRAPPERS))
_BASE_LAYER = ".base_layer."  # in front of a matrix's name where PEFT holds LoRA weights beside it
_INSIDE = "so transformers does not know them; save the model that is inside it with `save_pretrained`"


def missing_tensors(source: SourceModel, missing: list[str], unused: list[str], head: str | None) -> UserError:
    """What to say of a model whose folder lacks tensors.

    Args:
        missing: names of the tensors, as transformers' model has them.
        unused: stored names that the model has no use for.
        head: what the output head's is called.
    """
    first, path = missing[0], source.path
    for name in unused:
        bare = name.replace(_BASE_LAYER, ".")
        if bare != name and bare.endswith(first):
            return UserError(
                f"{path}: PEFT's LoRA weights lie beside the matrices and are not merged ({name}); merge them "
                "with `model.merge_and_unload()`, and save the model with `save_pretrained`"
            )
    for name in unused:
        if name.endswith(f".{first}"):
            prefix = name.removesuffix(first)
            tools = [tool for part, tool in _WRAPPERS.items() if part in prefix]
            return UserError(
                f"{path}: the names of its tensors begin with {prefix!r}, which {tools[0] if tools else 'some tool'} "
                f"has put there ({name}), {_INSIDE}"
            )
    for name in unused:
        wrapper = _WRAPPER.search(name)
        if wrapper is not None and _WRAPPER.sub("", name).endswith(first):
            return UserError(
                f"{path}: the names of its tensors hold {wrapper[0]!r}, which {_WRAPPERS[wrapper[0]]} has put there "
                f"({name}), {_INSIDE}"
            )
    stems = {name.rpartition(".")[0] for name in missing}
    for name in unused:
        if name.rpartition(".")[0] in stems and not is_float(source.dtypes[name]):
            return UserError(
                f"{path / source.files[name]}: tensor {name} is stored as {type_name(source.dtypes[name])}, so this "
                "checkpoint is quantized already; quantize the original model, in 16- or 32-bit floats"
            )
    if missing == [head] and (kind := _other_kind(source)):
        return UserError(
            f"{path} is a {kind}, which has no language model head ({head}) and gives no next token; quantize the "
            "causal language model that it was made from"
        )
    seen = f"; {len(unused)} others fit nothing, such as {unused[0]}" if unused else ""
    return UserError(f"{path}: tensor {first} is missing from the safetensors files{seen}; download the model again")


def _other_kind(source: SourceModel) -> str | None:
    """The architecture that config.json names, where it is none of a language model (a reward model, an encoder)."""
    named = read_config(source.path).get("architectures")
    kinds = [str(kind) for kind in named] if isinstance(named, list) else []
    return next((kind for kind in kinds if not kind.endswith(("LMHeadModel", "ForCausalLM", "Generation"))), None)
