"""SignSGD or Adam (an ablation of the paper)."""

from __future__ import annotations

from benchmarks.paper.experiment import Cell

NAME = "optimizer"
TITLE = "SignSGD or Adam"
TEXT = """Adam at the rate of SignSGD (1/steps) and at a half and a quarter of it; settings of `paper-v2` otherwise."""
PEER = None


def cells() -> list[Cell]:
    """SignSGD, and Adam at three rates, at W4G128 and 2 bits."""
    found = []
    for scheme in ("onnx:w4g128", "onnx:w2g128-asym"):
        found.append(Cell("SignSGD", scheme, "paper-v2"))
        for rate in (0.01, 0.005, 0.0025):
            found.append(Cell(f"Adam, rate {rate}", scheme, "paper-v2", {"optimizer": "adam", "lr": rate}))
    return found
