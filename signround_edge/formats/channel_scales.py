"""Scales of rows and columns that were folded into a matrix before it was quantized."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ChannelScales:
    """How a transform scaled a matrix: the run holds diag(rows)·W·diag(columns) in the place of the source's W.

    Attributes:
        rows: f32 [out features], or None for ones.
        columns: f32 [in features], or None for ones.
    """

    rows: Tensor | None = None
    columns: Tensor | None = None

    def apply(self, weight: Tensor) -> Tensor:
        """The scaled weight f32 [out, in]; every reader of a run computes it by these very operations."""
        if self.columns is not None:
            weight = weight * self.columns
        return weight if self.rows is None else weight * self.rows.unsqueeze(1)

    def take_rows(self, rows: slice) -> ChannelScales:
        """Those of some rows of the matrix."""
        return ChannelScales(None if self.rows is None else self.rows[rows], self.columns)

    def times(self, rows: Tensor | None = None, columns: Tensor | None = None) -> ChannelScales:
        """These scales and others after them."""
        both = ((self.rows, rows), (self.columns, columns))
        return ChannelScales(*(old if new is None else new if old is None else old * new for old, new in both))

    def to(self, device: torch.device) -> ChannelScales:
        """The same scales on a device."""
        return ChannelScales(*(None if t is None else t.to(device) for t in (self.rows, self.columns)))
