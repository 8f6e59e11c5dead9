"""Table 5 of the paper: reconstruct the output of a decoder block, or of each layer alone."""

from __future__ import annotations

from benchmarks.paper.experiment import Cell

NAME = "granularity"
TITLE = "Block-wise or layer-wise (the paper's table 5)"
TEXT = """Layer-wise tuning gives each matrix as many steps as a block gets, on its own output for the quantized model's
input. Settings of `paper-v2` and of our default recipe."""
PEER = None


def cells() -> list[Cell]:
    """Both granularities, with the paper's settings and with ours, at 4 and 2 bits."""
    return [
        Cell(f"{name}, {granularity}-wise", scheme, recipe, {"granularity": granularity})
        for scheme in ("onnx:w4g128", "onnx:w2g128-asym")
        for recipe, name in (("paper-v2", "SignRound v2"), ("default", "ours"))
        for granularity in ("block", "layer")
    ]
