"""RoPE's tables of cosines and sines as transformers has them, in the place of those that the builder computes.

Its classes know few types of RoPE, and some that they do not know they take for the default without a word (its yarn
neither rounds the correction range as transformers does nor knows attention_factor). In transformers a type is a vector
of frequencies and a factor, and the tables follow from these, unless it changes with the length of the text.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_CHANGING = ("dynamic", "longrope")


def static_rope(model: nn.Module) -> tuple[Tensor, float] | None:
    """(frequencies f32 [R/2], factor of cosines and sines) of transformers' model.

    None where it has several, none, or one that changes with the length.
    """
    found: list[Any] = [m for m in model.modules() if isinstance(getattr(m, "inv_freq", None), Tensor)]
    if len(found) != 1 or found[0].rope_type in _CHANGING:
        return None
    return found[0].inv_freq.float(), float(found[0].attention_scaling)


def use_rope(builder_model: Any, rope: tuple[Tensor, float]) -> None:
    """Let a model of the builder (`builders/base.py`) make its tables [positions, R] from these."""
    frequencies, factor = rope

    def tables() -> tuple[Tensor, Tensor]:
        positions = torch.arange(builder_model.rope_attrs["cache_length"], dtype=torch.int64).float()
        angles = torch.outer(positions, frequencies)
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos() * factor, angles.sin() * factor

    builder_model.make_rotary_embedding_caches_from_scratch = tables


def plain_rope(config: Any) -> None:
    """Tell the builder that a config's RoPE is the default one, so that it takes the tables as they are."""
    kept = ("rope_theta", "partial_rotary_factor", "mrope_section")
    config.rope_parameters = {
        **{key: value for key, value in config.rope_parameters.items() if key in kept},
        "rope_type": "default",
    }
