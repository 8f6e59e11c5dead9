"""How the model calls one of its decoder blocks: all that it is given besides hidden states."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from signround_edge.model.decoder import first_hidden

# (block, hidden states, further arguments) → hidden states.
Runner = Callable[[nn.Module, Tensor, tuple[Any, ...], dict[str, Any]], Tensor]
# Argument name → key → what an earlier block has put there for later ones, each [n, …]: keys and values of layers that
# share them. Blocks fill a mapping that all of them are given.
Shared = dict[str, dict[Any, tuple[Tensor, ...]]]


@dataclass(frozen=True)
class BlockCall:
    """The arguments besides the hidden states with which the model calls one block.

    Attributes:
        args: positional arguments after the hidden states.
        kwargs: keyword arguments (masks, position embeddings, …).
        rotations: position embeddings in other dtypes, by the tensor that they were made of; calls may share them.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    rotations: dict[tuple[int, torch.dtype], Tensor] = field(default_factory=dict)

    def tensors(self) -> list[Tensor]:
        """All tensors in it, in a fixed order."""
        found: list[Tensor] = []

        def keep(tensor: Tensor) -> Tensor:
            found.append(tensor)
            return tensor

        self.mapped(keep)
        return found

    def run(
        self, block: nn.Module, hidden: Tensor, shared: Shared | None = None, runner: Runner | None = None
    ) -> Tensor:
        """Hidden states [n, seqlen, hidden] after the block.

        Under autocast RoPE's cosines and sines have its dtype, or queries and keys would be rotated in f32; where they
        are one complex number they stay so, for the model rotates in f32 then.

        Args:
            shared: what the blocks before have put into arguments that all blocks share; this one's is added.
            runner: what calls the block; None: plainly.
        """
        call = self.mapped(lambda tensor: tensor)  # with mappings of its own, for blocks write into them
        kwargs = call.kwargs
        if "position_embeddings" in kwargs and torch.is_autocast_enabled(hidden.device.type):
            dtype = torch.get_autocast_dtype(hidden.device.type)
            kwargs["position_embeddings"] = _map(kwargs["position_embeddings"], lambda x: self._rotation(x, dtype))
        mappings = {name: (value, dict(value)) for name, value in kwargs.items() if isinstance(value, MutableMapping)}
        for name, (mapping, _) in mappings.items():
            mapping.update({} if shared is None else shared.get(name, {}))
        output = tokens_first((runner or run_plainly)(block, streams_first(hidden), call.args, kwargs))
        for name, (mapping, before) in mappings.items():
            left = {key: value for key, value in mapping.items() if value is not before.get(key)}
            if left and shared is not None:
                shared[name] = left
        return output

    def _rotation(self, embedding: Tensor, dtype: torch.dtype) -> Tensor:
        """A position embedding in a dtype, converted once for all steps: as long as the call is, so is its tensor."""
        key = id(embedding), dtype
        if embedding.is_floating_point() and key not in self.rotations:
            self.rotations[key] = embedding.to(dtype)
        return self.rotations.get(key, embedding)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> BlockCall:
        """The same call with changed tensors, in mappings and lists of its own."""
        return BlockCall(_map(self.args, change), _map(self.kwargs, change))


def run_plainly(block: nn.Module, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Call a block, operator by operator."""
    return first_hidden(block(hidden, *args, **kwargs))


@functools.cache
def compiled_runner(backend: str = "inductor") -> Runner:
    """Call a block by kernels that torch.compile has made of its forward and backward pass.

    They are made once for all blocks of one kind and shape: weights are arguments of theirs.
    """
    compiled: Runner = torch.compile(run_plainly, dynamic=False, backend=backend)
    return compiled


def moved_calls(calls: list[BlockCall], device: torch.device) -> list[BlockCall]:
    """The calls with their tensors on a device; those that several blocks are given are copied once."""
    moved: dict[int, Tensor] = {}

    def move(tensor: Tensor) -> Tensor:
        if id(tensor) not in moved:
            moved[id(tensor)] = tensor.to(device)
        return moved[id(tensor)]

    rotations: dict[tuple[int, torch.dtype], Tensor] = {}
    return [replace(call.mapped(move), rotations=rotations) for call in calls]


def tokens_first(hidden: Tensor) -> Tensor:
    """Hidden states as tuning has them: of several parallel streams (AltUp) [n, seqlen, streams, hidden]."""
    return hidden.movedim(0, 2) if hidden.ndim == 4 else hidden


def streams_first(hidden: Tensor) -> Tensor:
    """Hidden states as the model has them: of several parallel streams [streams, n, seqlen, hidden]."""
    return hidden.movedim(2, 0) if hidden.ndim == 4 else hidden


def _map(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A copy of nested tuples, lists and mappings, also such as torch does not know, with changed tensors."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return type(value)(_map(item, change) for item in value)
    if isinstance(value, MutableMapping):
        changed = copy.copy(value)
        for key, item in value.items():
            changed[key] = _map(item, change)
        return changed
    return value
