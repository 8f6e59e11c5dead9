"""Names of parameters in GGUF files, by gguf's tables."""

from __future__ import annotations

import functools
import re

import gguf

from signround_edge.model.experts import split_expert

# Of Qwen3-Next's fused projection the larger part is attn_qkv; Nemotron-H's checkpoints begin with "backbone.".
_RESPELLED = (
    ("in_proj_qkvz", "in_proj_qkv"),
    (".block_sparse_moe.experts.", ".mlp.experts."),
    (".block_sparse_moe.router", ".block_sparse_moe.router.layer"),
    (".mixer.experts.", ".mlp.experts."),
    ("model.layers.0.mixer.", "backbone.layers.0.mixer."),
)
_BLOCK = re.compile(r"\.(\d+)\.")


@functools.cache
def gguf_name(name: str, model_type: str) -> str | None:
    """The name that a parameter would have in a GGUF file ("blk.3.ffn_down.weight"), or None when llama.cpp has none.

    The matrices of a layer's experts share one name: they are stacked in one tensor.

    Args:
        name: parameter name in the Hugging Face model.
        model_type: of its config.json; decides where architectures disagree.
    """
    block = _BLOCK.search(name)
    stem, _, leaf = _BLOCK.sub(".0.", split_expert(name)[0], count=1).rpartition(".")  # all blocks are named alike
    for spelling in _spellings(stem):
        for arch in _likeliest_first(model_type):
            found = name_table(arch, 1).get_name(spelling)
            if found is not None:
                return f"{found.replace('blk.0.', f'blk.{block[1]}.') if block else found}.{leaf}"
    return None


def _spellings(stem: str) -> list[str]:
    """A name as transformers 5 has it, and as gguf's tables, which know published checkpoints, spell it."""
    respelled = stem
    for part, spelt in _RESPELLED:
        respelled = respelled.replace(part, spelt)
    return [respelled, stem] if respelled != stem else [stem]


@functools.cache
def _likeliest_first(model_type: str) -> list[gguf.MODEL_ARCH]:
    """The architecture that is spelt like the model type, then all others."""
    wanted = model_type.replace("_", "").removesuffix("text")
    spelt = {arch: name.replace("-", "") for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    return sorted(gguf.MODEL_ARCH, key=lambda arch: spelt.get(arch) != wanted)


@functools.cache
def name_table(arch: gguf.MODEL_ARCH, blocks: int) -> gguf.TensorNameMap:
    """One of gguf's tables. Making it writes the architecture's own names into a table that all share; undo that."""
    shared = gguf.TensorNameMap.block_mappings_cfg
    before = dict(shared)
    try:
        return gguf.get_tensor_name_map(arch, blocks)
    finally:
        shared.clear()
        shared.update(before)
