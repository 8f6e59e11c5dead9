"""What tuning did to the roundings of a matrix, in numbers small enough to keep: for `signround-edge analyze`.

V itself is not stored in a run (it would be four times the codes), so what is to be said about it is counted while it
exists.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from signround_edge.formats import QuantizedTensor
from signround_edge.formats.grid import field_rows
from signround_edge.tuning.block.sign_step import RoundingState, row_chunks

# Bins of V's histogram over [−0.5, 0.5]; an odd number, so that V = 0 is in the middle of one.
V_BINS = 41


@dataclass(frozen=True)
class RoundingStatistics:
    """Counts of one matrix of R rows and K input channels.

    A weight is raised when its code moved up the real axis (a higher code, or a lower one under a negative scale).

    Attributes:
        v_histogram: int64 [V_BINS], values of V in equal bins over [−0.5, 0.5], at the step that was kept.
        raised, lowered: int64 [K], codes of each input channel above and below those of plain rounding on the initial
            scales.
        overruled: int64 [2], codes above and below those of plain rounding on the tuned scales: what V (and GPTQ, where
            tuning starts from its codes) did, not the scales.
        importance: f32 [K], E[x²] of the input channels.
    """

    v_histogram: Tensor
    raised: Tensor
    lowered: Tensor
    overruled: Tensor
    importance: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """By name, as the run directory stores them."""
        return dict(vars(self))


def v_histogram(state: RoundingState) -> Tensor:
    """int64 [V_BINS] of V as it is now."""
    counts = torch.zeros(V_BINS, dtype=torch.int64)
    for part in row_chunks(state.v):
        counts += torch.histc(state.rows(part).shift, bins=V_BINS, min=-0.5, max=0.5).long().cpu()
    return counts


def rounding_statistics(
    weight: Tensor, rounded: QuantizedTensor, kept: QuantizedTensor, histogram: Tensor, importance: Tensor
) -> RoundingStatistics:
    """Compare the codes that are kept with plain rounding on the scales of before and after tuning.

    Args:
        weight: the original one, f32 [R, K].
        rounded: it, rounded to nearest on the initial scales.
        histogram: of V when `kept` was taken.
    """
    grid, channels = kept.grid, kept.codes.shape[1]
    raised, lowered = (torch.zeros(channels, dtype=torch.int64) for _ in range(2))
    overruled = torch.zeros(2, dtype=torch.int64)
    blocks, codes, nearest = (grid.blocked(t) for t in (weight, kept.codes, rounded.codes))
    for part in row_chunks(blocks):
        upwards = grid.affine_view(field_rows(rounded.fields, part))[0].sign().unsqueeze(-1)
        nearest_now = grid.round_codes(blocks[part], field_rows(kept.fields, part))
        moved, by_v = ((codes[part].float() - other) * upwards for other in (nearest[part], nearest_now))
        raised += (moved > 0).sum(0).flatten().cpu()
        lowered += (moved < 0).sum(0).flatten().cpu()
        overruled += torch.stack([(by_v > 0).sum(), (by_v < 0).sum()]).cpu()
    return RoundingStatistics(histogram, raised, lowered, overruled, importance.float().cpu())
