"""A fold: channels between two layers of a decoder block that may be scaled without changing what the block computes.

A producer (a norm, or rows of a linear layer) and all the linear layers that read its channels. With scales s,

    producer: w ← w/s, b ← b/s          consumers: W ← W·diag(s)

leave the block's function as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from signround_edge.model.decoder import out_in, weight_of
from signround_edge.model.experts import Experts


@dataclass(frozen=True)
class Fold:
    """Channels that may be scaled.

    Attributes:
        producer: name of the norm or linear layer within the block.
        consumers: names of the linear layers that read the channels.
        rows: (first, last + 1) of the producer's output channels; a packed projection has others besides.
        adds_one: the producer is a norm that multiplies by 1 + weight (Gemma).
        head_size, group: each `head_size` channels are read by `group` heads one after another (grouped-query
            attention); a group of 1 means that consumers read the channels as they are.
    """

    producer: str
    consumers: tuple[str, ...]
    rows: tuple[int, int]
    adds_one: bool = False
    head_size: int = 1
    group: int = 1

    def __str__(self) -> str:
        return f"{self.producer} → {', '.join(self.consumers)}"

    @property
    def channels(self) -> int:
        """How many scales there are to choose."""
        return self.rows[1] - self.rows[0]

    def to_columns(self, scales: Tensor) -> Tensor:
        """Scales [channels] as factors of the consumers' columns [channels · group]."""
        heads = scales.view(-1, 1, self.head_size)
        return heads.expand(-1, self.group, -1).reshape(-1)


def linear_layers(module: nn.Module) -> dict[str, nn.Module]:
    """Name → nn.Linear or Conv1D below a module; experts are left out."""
    hidden = {m for experts in module.modules() if isinstance(experts, Experts) for m in experts.modules()}
    return {n: m for n, m in module.named_modules() if isinstance(m, nn.Linear | Conv1D) and m not in hidden}


def scaled_vectors(
    block: nn.Module, before: Mapping[str, Tensor], fold: Fold, scales: Tensor
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """What a fold makes of its producer.

    Args:
        block: holds the parameters of the source.
        before: what other folds have made of its vectors.
        scales: f32 [channels].
    Returns:
        factors of a linear layer's rows f32 [out] (None: the producer is a norm), and the new form of its vectors, by
        parameter name within the block.
    """
    producer = block.get_submodule(fold.producer)
    factors = torch.ones(output_count(producer), device=scales.device)
    factors[slice(*fold.rows)] = scales.reciprocal()
    vectors = {}
    for leaf, parameter in producer._parameters.items():
        if parameter is not None and parameter.ndim == 1:
            name, one = f"{fold.producer}.{leaf}", 1.0 if fold.adds_one and leaf == "weight" else 0.0
            vectors[name] = (before.get(name, parameter.detach()) + one) * factors - one
    return (None if is_norm(producer) else factors), vectors


def is_norm(module: nn.Module) -> bool:
    """Whether a module holds a vector as its weight."""
    weight = module._parameters.get("weight")
    return weight is not None and weight.ndim == 1


def output_count(module: nn.Module) -> int:
    """Output channels of a norm or linear layer."""
    return int((weight_of(module) if is_norm(module) else out_in(module)).shape[0])
