"""Sums of products of channels, added up half of a symmetric matrix at a time."""

from __future__ import annotations

import pytest
import torch

from signround_edge.tuning.calibration.activations import equal_weights
from signround_edge.tuning.calibration.input_moments import Hessians


@pytest.mark.parametrize("channels", [3, 256, 257, 600])
def test_products_of_all_pairs_of_channels_are_there(channels: int) -> None:
    generator = torch.Generator().manual_seed(channels)
    found = Hessians(equal_weights)
    weighted = []
    for _ in range(2):
        inputs, weights = (torch.rand(2, 50, n, generator=generator) for n in (channels, 1))
        found.add("m", inputs, weights)
        weighted.append((inputs * weights.sqrt()).flatten(0, 1).double())
    rows = torch.cat(weighted)
    torch.testing.assert_close(found.result()["m"].double(), rows.T @ rows, atol=1e-3, rtol=1e-5)
