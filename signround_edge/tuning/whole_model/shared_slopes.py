"""Gradients of what blocks leave for later ones (shared keys and values), while blocks are walked backwards."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from signround_edge.tuning.calibration.block_call import Shared


@dataclass
class SharedSlopes:
    """∂loss/∂(each shared tensor), summed over the blocks walked so far that read it.

    Attributes:
        found: (argument, key, number) → gradient, until the block that wrote the tensor takes it.
    """

    found: dict[tuple[str, Any, int], Tensor] = field(default_factory=dict)

    def leaves(self, shared: Shared) -> Shared:
        """The same tensors as leaves that take gradients: what a block is given."""
        return {
            name: {key: tuple(part.detach().requires_grad_() for part in parts) for key, parts in mapping.items()}
            for name, mapping in shared.items()
        }

    def of_written(self, given: Shared, left: Shared) -> tuple[list[Tensor], list[Tensor]]:
        """What a block has written itself and later ones read, and its gradients, which are settled by that."""
        tensors, slopes = [], []
        for name, mapping in left.items():
            for key, parts in mapping.items():
                if given.get(name, {}).get(key) is parts:
                    continue
                for number, part in enumerate(parts):
                    slope = self.found.pop((name, key, number), None)
                    if slope is not None:
                        tensors.append(part)
                        slopes.append(slope.to(part.dtype))
        return tensors, slopes

    def collect(self, given: Shared) -> None:
        """Add the gradients that a block's backward pass has left in what it was given."""
        for name, mapping in given.items():
            for key, parts in mapping.items():
                for number, part in enumerate(parts):
                    if part.grad is not None:
                        at = (name, key, number)
                        self.found[at] = part.grad if at not in self.found else self.found[at] + part.grad
