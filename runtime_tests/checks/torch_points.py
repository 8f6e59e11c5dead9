"""Torch's hidden states at every layer: what the tensors inside a runtime's graph are compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from signround_edge.evaluation.metrics import FloatArray, TokenArray
from signround_edge.evaluation.perplexity import TorchSession
from signround_edge.model.decoder import first_hidden

EMBEDDING = "token embedding"


@dataclass(frozen=True)
class Point:
    """The hidden states at one place of the model.

    Attributes:
        name: the module whose output it is ("model.layers.3"), or `EMBEDDING`.
        is_layer: a decoder block's output, the embedding that enters the first block, or the final norm's output:
            places that every runtime has. Others (the output of a block's attention or norm) may be fused away.
        states: f32 [n, hidden].
    """

    name: str
    is_layer: bool
    states: FloatArray


def torch_points(session: TorchSession, tokens: TokenArray, blocks: str) -> list[Point]:
    """Hidden states in the order in which torch computes them, for one window from an empty cache.

    Args:
        session: the model with the run's dequantized weights.
        tokens: int32 [n].
        blocks: name of the list of decoder blocks ("model.layers").
    """
    model: nn.Module = session.model
    points: list[Point] = []
    names = {module: name for name, module in model.named_modules()}
    layers = list(model.get_submodule(blocks).children())
    base = model.get_submodule(blocks.rpartition(".")[0])
    # A final norm follows the blocks in the base model. What precedes them ends in the input of block 0.
    children = list(base.children())
    after = children[children.index(model.get_submodule(blocks)) + 1 :]
    width = 0

    def record(name: str, is_layer: bool, value: Any) -> None:
        hidden = first_hidden(value) if isinstance(value, Tensor | tuple | list) and len(value) else None
        if isinstance(hidden, Tensor) and hidden.shape == (1, len(tokens), width):
            points.append(Point(name, is_layer, hidden[0].float().cpu().numpy()))

    def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal width
        hidden = args[0] if args else kwargs["hidden_states"]
        width = hidden.shape[-1]
        record(EMBEDDING, True, hidden)

    def leave(module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        record(names[module], module in layers or module in after, output)

    handles = [layers[0].register_forward_pre_hook(enter, with_kwargs=True)]
    for module in [m for layer in layers for m in (layer, *layer.children())] + after:
        handles.append(module.register_forward_hook(leave))
    try:
        with torch.no_grad():
            session.logits(tokens)
    finally:
        for handle in handles:
            handle.remove()
    return points
