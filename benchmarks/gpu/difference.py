"""What differs between two quantized tensors, and why, as far as it can be told."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from benchmarks.gpu.parts import Row
from signround_edge.formats import QuantizedTensor
from signround_edge.tuning.calibration.activations import CPU

EQUAL = "equal"


@dataclass(frozen=True)
class Difference:
    """What differs between two tensors on one grid.

    Attributes:
        codes_percent: codes that differ.
        largest: difference of codes.
        scales_percent: blocks with another scale or zero point.
        same_scales_percent: codes that differ in blocks with equal ones.
    """

    codes_percent: float
    largest: int
    scales_percent: float
    same_scales_percent: float

    @classmethod
    def between(cls, one: QuantizedTensor, other: QuantizedTensor) -> Difference:
        """Of a tensor on the CPU and one on any device."""
        grid, other = one.grid, other.to(CPU)
        apart = (grid.blocked(one.codes).int() - grid.blocked(other.codes).int()).abs()
        views = (grid.affine_view(tensor.fields) for tensor in (one, other))
        scales = torch.stack([(a != b) for a, b in zip(*views, strict=True)]).any(0)
        moved = apart.bool()
        shares = (moved.float().mean(), scales.float().mean(), (moved & ~scales.unsqueeze(-1)).float().mean())
        codes, fields, same = (100 * float(share) for share in shares)
        return cls(codes, int(apart.max()), fields, same)

    @staticmethod
    def of_all(found: Iterable[Difference]) -> Difference:
        """The worst of several matrices."""
        columns = zip(*(vars(one).values() for one in found), strict=True)
        return Difference(*(max(column) for column in columns))

    def row(self) -> Row:
        """For a table."""
        return {"codes_percent": self.codes_percent, "largest": self.largest, "scales_percent": self.scales_percent}

    def why(self, worse: float) -> str:
        """As far as it can be told, `worse` being the error on the device over that on the CPU, less 1."""
        if not self.codes_percent and not self.scales_percent:
            return EQUAL
        said = []
        if self.scales_percent:
            said.append(f"other candidates win in {self.scales_percent:.2g} % of blocks")
        if self.same_scales_percent:
            said.append(f"{self.same_scales_percent:.2g} % of codes on equal scales")
        judged = "no worse: sums in another order" if worse < 1e-4 else "WORSE on the device"
        return f"{'; '.join(said)}; error {worse:+.1e}, {judged}"
