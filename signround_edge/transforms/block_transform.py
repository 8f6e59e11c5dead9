"""What folds make of one decoder block: scales of its matrices, and norm weights and biases in their new form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from signround_edge.formats.channel_scales import ChannelScales
from signround_edge.model.decoder import out_in, set_out_in, set_tensor
from signround_edge.transforms.folds import Fold, scaled_vectors

_UNCHANGED = ChannelScales()


@dataclass(frozen=True)
class BlockTransform:
    """A block's transform; by default none.

    Attributes:
        scales: name of a matrix's parameter within the block → its scales.
        vectors: name of a norm weight or bias within the block → what takes its place, f32.
    """

    scales: Mapping[str, ChannelScales] = field(default_factory=dict)
    vectors: Mapping[str, Tensor] = field(default_factory=dict)

    def of(self, name: str) -> ChannelScales:
        """The scales of a matrix, by its parameter's name within the block."""
        return self.scales.get(name, _UNCHANGED)

    def with_fold(self, block: nn.Module, fold: Fold, scales: Tensor) -> BlockTransform:
        """This transform and a fold after it; `block` holds the parameters of the source."""
        changed = dict(self.scales)
        for name in fold.consumers:
            key = f"{name}.weight"
            changed[key] = self.of(key).times(columns=fold.to_columns(scales))
        rows, vectors = scaled_vectors(block, self.vectors, fold, scales)
        if rows is not None:
            key = f"{fold.producer}.weight"
            changed[key] = self.of(key).times(rows=rows)
        return replace(self, scales=changed, vectors={**self.vectors, **vectors})

    def install(self, block: nn.Module) -> None:
        """Put the transformed weights into a block that holds the source's."""
        for name, scales in self.scales.items():
            module = block.get_submodule(name.removesuffix(".weight"))
            set_out_in(module, scales.apply(out_in(module)))
        self.install_vectors(block)

    def install_vectors(self, block: nn.Module) -> None:
        """Put the transformed norm weights and biases alone into the block."""
        for name, vector in self.vectors.items():
            set_tensor(block, name, nn.Parameter(vector, requires_grad=False))

    def to(self, device: torch.device) -> BlockTransform:
        """The same transform on a device."""
        return BlockTransform(
            {name: scales.to(device) for name, scales in self.scales.items()},
            {name: vector.to(device) for name, vector in self.vectors.items()},
        )
