"""What the exporter knows about onnxruntime-genai's model builder: architectures, RoPE types, and names in its graphs.

Names are those of onnxruntime_genai/models/builders/base.py, version 0.18.0. Initializer names are a function of the
module path, so one table of patterns maps them back to Hugging Face parameter names.
"""

from __future__ import annotations

import re
from typing import Any

from signround_edge.errors import UserError

# Architecture → RoPE types that the builder turns into the graph that transformers computes (shown by tests). Its Llama
# class ignores every type but default and llama3 without a word, and its yarn neither rounds the correction range as
# transformers does nor knows attention_factor, so those are refused.
ARCHITECTURES: dict[str, tuple[str, ...]] = {
    "LlamaForCausalLM": ("default", "llama3"),
    "MistralForCausalLM": ("default", "linear"),
    "Qwen2ForCausalLM": ("default", "linear"),
    "Qwen3ForCausalLM": ("default", "linear"),
}

GENAI_CONFIG = "genai_config.json"
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
EMBEDDING_NODE = "/model/embed_tokens/Gather"
HEAD_BASE = "lm_head.MatMulNBits"

_LAYER = r"model\.layers\.(\d+)\."
_PROJECTION = re.compile(_LAYER + r"(attn|mlp)\.(\w+_proj)\.(?:MatMul\.weight|MatMulNBits\.qweight|Add\.(bias))")
_QK_NORM = re.compile(_LAYER + r"attn\.(q_norm|k_norm)\.layernorm\.weight")
_NORM = re.compile(_LAYER + r"(input_layernorm|post_attention_layernorm)\.weight")
_FINAL_NORM = re.compile(_LAYER + r"final_norm_layernorm\.weight")
_MODULES = {"attn": "self_attn", "mlp": "mlp"}


def parameters_of(initializer: str) -> tuple[str, ...]:
    """Hugging Face parameters that an initializer of the builder's graph holds, in row order; () when it holds none.

    >>> parameters_of("model.layers.3.attn.qkv_proj.MatMulNBits.qweight")[1]
    'model.layers.3.self_attn.k_proj.weight'
    """
    if initializer == EMBEDDING or initializer == "model.embed_tokens.MatMulNBits.qweight":
        return (EMBEDDING,)
    if initializer in ("lm_head.MatMul.weight", "lm_head.MatMulNBits.qweight"):
        return (HEAD,)
    if match := _PROJECTION.fullmatch(initializer):
        layer, module, name, bias = match.groups()
        names = ("q_proj", "k_proj", "v_proj") if name == "qkv_proj" else (name,)
        return tuple(f"model.layers.{layer}.{_MODULES[module]}.{n}.{bias or 'weight'}" for n in names)
    if match := _QK_NORM.fullmatch(initializer):
        return (f"model.layers.{match[1]}.self_attn.{match[2]}.weight",)
    if match := _NORM.fullmatch(initializer):
        return (f"model.layers.{match[1]}.{match[2]}.weight",)
    if _FINAL_NORM.fullmatch(initializer):
        return ("model.norm.weight",)
    return ()


def builder_knows(config: dict[str, Any]) -> bool:
    """Whether the builder makes the right graph of this config.json's architecture."""
    return _architecture(config) in ARCHITECTURES


def check_rope(config: dict[str, Any], source: str) -> None:
    """UserError unless the builder knows the RoPE of this architecture (one that it knows); `source` names the file."""
    architecture = _architecture(config)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ARCHITECTURES[architecture]:
        raise UserError(
            f"--format onnx cannot export the RoPE type {kind!r} of {architecture} ({source}); types that work for it "
            f"are {', '.join(ARCHITECTURES[architecture])}; or give a graph of your own with --template model.onnx"
        )


def _architecture(config: dict[str, Any]) -> str:
    return str(next(iter(config.get("architectures") or ["none"])))


def decoder_config(config: dict[str, Any]) -> dict[str, Any]:
    """A copy of config.json for the builder, with what it needs and Hugging Face implies.

    Mistral's sliding window applies to every layer, but the builder reads it from `layer_types`, which Mistral's
    config does not have; without it 0.18.0 attends to everything (KL 0.013 on a random model with a window of 16).
    """
    result = dict(config)
    if "MistralForCausalLM" in config["architectures"] and config.get("sliding_window"):
        result["layer_types"] = ["sliding_attention"] * config["num_hidden_layers"]
    return result
