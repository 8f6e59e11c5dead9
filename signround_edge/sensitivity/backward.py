"""One block backward: from the slopes of what leaves it to those of what enters it, whatever that is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from signround_edge.tuning.calibration.activations import Stream
from signround_edge.tuning.calibration.block_call import BlockCall, Shared
from signround_edge.tuning.calibration.shell import Shell

_Place = tuple[str, Any, int]  # argument, key and number of a tensor that blocks share


@dataclass
class Backward:
    """Slopes on the way back, of all samples, on the CPU.

    Attributes:
        hidden: of the hidden states between two blocks, f32 [samples, seqlen, hidden].
        shared: of what an earlier block left for later ones (keys and values), each [samples, …].
        arguments: (block, number of the tensor in its call) → slopes of an argument that depends on tokens.
    """

    hidden: Tensor
    shared: dict[_Place, Tensor] = field(default_factory=dict)
    arguments: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    _done: set[_Place] = field(default_factory=set)

    def add_shared(self, place: _Place, part: slice, slope: Tensor) -> None:
        """Add what a later block says of a shared tensor."""
        if place not in self.shared:
            self.shared[place] = torch.zeros((len(self.hidden), *slope.shape[1:]))
        self.shared[place][part] += slope.cpu()

    def take_shared(self, place: _Place, part: slice, like: Tensor) -> Tensor:
        """All that later blocks say of a tensor that this block makes."""
        self._done.add(place)
        return self.shared[place][part].to(like) if place in self.shared else torch.zeros_like(like)

    def add_argument(self, place: tuple[int, int], part: slice, slope: Tensor) -> None:
        """Keep the slope of an argument [n, …] of a batch."""
        if place not in self.arguments:
            self.arguments[place] = torch.zeros((len(self.hidden), *slope.shape[1:]))
        self.arguments[place][part] = slope.cpu()

    def close_block(self) -> None:
        """What a block has made belongs to no earlier one."""
        for place in self._done:
            self.shared.pop(place, None)
        self._done.clear()


def run_backward(
    shell: Shell, index: int, tokens: Tensor, stream: Stream, part: slice, state: Backward, device: torch.device
) -> None:
    """Run a loaded block forward and backward on one batch; slopes in `state` become those of what enters it.

    Args:
        tokens: of the batch, int64 [n, seqlen].
        stream: what enters the block, of all samples.
        part: the batch among them.
    """
    hidden, shared = stream.at(part, device)
    entering = hidden.requires_grad_()
    given = {
        (name, key, number): tensor.requires_grad_()
        for name, mapping in shared.items()
        for key, tensors in mapping.items()
        for number, tensor in enumerate(tensors)
        if tensor.is_floating_point()
    }
    call, leaves = _with_leaves(shell.block_call(index, tokens, device), shell.depends_on_tokens(tokens), len(tokens))
    left: Shared = {name: dict(mapping) for name, mapping in shared.items()}
    output = call.run(shell.decoder.blocks[index], entering, left)
    outputs, slopes = [output], [state.hidden[part].to(output)]
    known = {id(tensor) for tensor in given.values()}
    for name, mapping in left.items():
        for key, tensors in mapping.items():
            for number, tensor in enumerate(tensors):
                if id(tensor) not in known and tensor.requires_grad:
                    outputs.append(tensor)
                    slopes.append(state.take_shared((name, key, number), part, tensor))
    torch.autograd.backward(outputs, slopes)
    assert entering.grad is not None
    state.hidden[part] = entering.grad.cpu()
    for place, tensor in given.items():
        if tensor.grad is not None:
            state.add_shared(place, part, tensor.grad)
    for number, leaf in leaves.items():
        if leaf.grad is not None:
            state.add_argument((index, number), part, leaf.grad)


def _with_leaves(call: BlockCall, depends: bool, batch: int) -> tuple[BlockCall, dict[int, Tensor]]:
    """The call with tensors of its own for those that may depend on tokens, and these by their number in the call."""
    if not depends:
        return call, {}
    leaves: dict[int, Tensor] = {}
    numbers = iter(range(len(call.tensors())))

    def leaf(tensor: Tensor) -> Tensor:
        number = next(numbers)
        if not tensor.is_floating_point() or tensor.ndim == 0 or len(tensor) != batch:
            return tensor
        leaves[number] = tensor.detach().clone().requires_grad_()
        return leaves[number]

    return call.mapped(leaf), leaves
