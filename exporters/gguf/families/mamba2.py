"""Mamba-2: its layers, in models of nothing else and, in the modules of their families, beside attention."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import gguf

from exporters.gguf.families.family import Family, Stored
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


ANY_LENGTH = 2**20  # the context that llama.cpp's converter writes where nothing limits it
RESPELLED = ((".dt_bias", ".dt_proj.bias"),)


def mamba_problems(conv_bias: bool, time_steps: tuple[float, float]) -> Iterator[str]:
    """What llama.cpp's graph does not compute of Mamba-2 layers, whatever the family.

    Args:
        conv_bias: convolutions have a bias.
        time_steps: the least and the largest time step.
    """
    if not conv_bias:
        yield "needs biases of its convolutions, this model has none"
    low, high = time_steps
    if (low, high) != (0, float("inf")):
        yield f"has no limits for time steps, this model limits them to {low}–{high}"


def prefixed_sizes(config: Config) -> Mamba:
    """As hybrids of Mamba-2 and attention spell them (Granite 4, Bamba)."""
    inner = int(config["mamba_expand"] * config["hidden_size"])
    kernel, state, groups, heads = (config[f"mamba_{key}"] for key in ("d_conv", "d_state", "n_groups", "n_heads"))
    return Mamba(int(kernel), int(state), int(groups), int(heads), inner)


def heads_by_layer(kinds: list[str], config: Config) -> Config:
    """Key heads of each layer of a hybrid: llama.cpp takes layers that have none for those of Mamba-2."""
    heads = int(config["num_key_value_heads"])
    return {"key_heads_by_layer": [heads if kind == "full_attention" else 0 for kind in kinds]}


def _sizes(config: Config) -> Mamba:
    inner = int(config["expand"] * config["hidden_size"])
    kernel, state, groups, heads = (config[key] for key in ("conv_kernel", "state_size", "n_groups", "num_heads"))
    return Mamba(int(kernel), int(state), int(groups), int(heads), inner)


def _derived(config: Config) -> Config:
    """There is neither attention nor a feed-forward network."""
    return {
        "num_attention_heads": 0,
        "intermediate_size": 0,
        "max_position_embeddings": ANY_LENGTH,
        "norm_eps": config["layer_norm_epsilon"],
    }


def _problems(config: Config) -> Iterator[str]:
    yield from mamba_problems(config["use_conv_bias"], tuple(config["time_step_limit"]))


ROWS = (
    Family(
        "mamba2",
        gguf.MODEL_ARCH.MAMBA2,
        derived=_derived,
        keys=lambda writer, config: _sizes(config).add_keys(writer),
        problems=_problems,
        rotary=False,
        without=(".mixer.in_proj.bias", ".mixer.out_proj.bias"),
        stored=lambda config, name, shape: _sizes(config).stored(name, shape),
        respelled=RESPELLED,
    ),
)
