"""Names of onnxruntime-genai's model builder in the graphs that peers make: initializer → Hugging Face parameters.

Source: onnxruntime_genai/models/builders/base.py, version 0.18.0, which makes names of the module's path.
"""

from __future__ import annotations

import re

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

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
