"""Hunyuan, the dense models."""

from __future__ import annotations

import gguf

from exporters.gguf.families.family import NO_OUTPUT_BIAS, Family
from exporters.gguf.families.rope import rope_parameters
from exporters.gguf.families.row_orders import Config
from signround_edge.model.config import head_dim

_CONTEXT = 256 * 1024  # what the base frequency is stretched for
_PUBLISHED_CONTEXT = 32 * 1024  # what config.json of the published models has


def _derived(config: Config) -> Config:
    """A fixed `alpha` stretches the base frequency. Source: `compute_ntk_alpha_rope_parameters` in transformers."""
    rope = rope_parameters(config)
    alpha = rope.get("alpha")
    if rope["rope_type"] != "dynamic" or not alpha:
        return {}
    dim = head_dim(config)
    theta = float(rope["rope_theta"]) * float(alpha) ** (dim / (dim - 2))
    length = int(config["max_position_embeddings"])
    return {
        "rope_parameters": {**rope, "rope_type": "default", "rope_theta": theta},
        "max_position_embeddings": _CONTEXT if length == _PUBLISHED_CONTEXT else length,
    }


def _keys(writer: gguf.GGUFWriter, config: Config) -> None:
    if rope_parameters(config).get("alpha"):
        writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)
        writer.add_rope_scaling_factor(1.0)
        writer.add_rope_scaling_orig_ctx_len(int(config["max_position_embeddings"]))


ROWS = (
    Family(
        "hunyuan_v1_dense",
        gguf.MODEL_ARCH.HUNYUAN_DENSE,
        derived=_derived,
        keys=_keys,
        rope_scalings=("llama3",),
        without=NO_OUTPUT_BIAS,
    ),
)
