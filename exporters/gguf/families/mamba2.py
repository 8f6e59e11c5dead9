"""Mamba-2: its layers, in models of nothing else and, in the modules of their families, beside attention."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import gguf

from exporters.gguf.families.family import Stored
from exporters.gguf.families.row_orders import Config
from exporters.gguf.functions import MINUS_EXP


@dataclass(frozen=True)
class Mamba:
    """Sizes of a model's Mamba-2 layers, which every family's config spells otherwise.

    Attributes:
        kernel: tokens that the convolution sees.
        state: values of the state for each value of a head.
        groups: groups of heads that share B and C.
        heads: number of heads.
        inner: values of all heads together.
    """

    kernel: int
    state: int
    groups: int
    heads: int
    inner: int

    def add_keys(self, writer: gguf.GGUFWriter) -> None:
        """The `<arch>.ssm.*` keys."""
        writer.add_ssm_conv_kernel(self.kernel)
        writer.add_ssm_state_size(self.state)
        writer.add_ssm_group_count(self.groups)
        writer.add_ssm_inner_size(self.inner)
        writer.add_ssm_time_step_rank(self.heads)

    def stored(self, name: str, shape: tuple[int, ...]) -> tuple[Stored, ...] | None:
        """How a parameter of such a layer is stored. Source: `Mamba2Model.modify_tensors` in conversion/mamba.py."""
        if name.endswith(".A_log"):
            return (Stored(shape=(*shape, 1), function=MINUS_EXP),)
        if name.endswith(".D"):
            return (Stored(shape=(*shape, 1)),)
        if name.endswith((".mamba.norm.weight", ".mixer.norm.weight")):
            return (Stored(shape=(self.groups, self.inner // self.groups)),)
        return None


RESPELLED = ((".dt_bias", ".dt_proj.bias"),)


def mamba_problems(config: Config, conv_bias: bool) -> Iterator[str]:
    """What llama.cpp's graph does not compute of Mamba-2 layers, whatever the family."""
    if not conv_bias:
        yield "needs biases of its convolutions, this model has none"
    low, high = config["time_step_limit"]
    if (float(low), float(high)) != (0, float("inf")):
        yield f"has no limits for time steps, this model limits them to {low}–{high}"
