"""The paper's main tables: RTN, GPTQ and SignRound at W4, W4G128, W3G128, and 2 bits (its second version)."""

from __future__ import annotations

from benchmarks.paper.experiment import Cell

NAME = "bits"
TITLE = "RTN, GPTQ and SignRound by bits and block size"
TEXT = """RTN takes each block's extremes as its scale; "our search" is `--steps 0`. GPTQ goes by falling diagonal of
the Hessian (act-order) with scales of either kind. SignRound v1 moves the rounding alone, v2 clips too (recipes
`paper-v1` and `paper-v2`, at the steps and samples of this table); ours is the default recipe at the same steps and
samples. All schemes are symmetric but for 2 bits."""
PEER = "GPTQ"

# Scheme → how the paper would write it.
SCHEMES = {
    "onnx:w4": "W4",
    "onnx:w4g128": "W4G128",
    "onnx:w3g128": "W3G128",
    "onnx:w2g128-asym": "W2G128",
    "onnx:w2g32-asym": "W2G32",
}


def cells() -> list[Cell]:
    """Every method at every scheme."""
    return [cell for scheme in SCHEMES for cell in _of(scheme)]


def _of(scheme: str) -> list[Cell]:
    return [
        Cell("RTN", scheme, "default", {"steps": 0, "scale_init": "absmax"}),
        Cell("RTN, our search", scheme, "default", {"steps": 0}),
        Cell("GPTQ", scheme, None, {"scale_init": "absmax"}),
        Cell("GPTQ, our search", scheme, None, {}),
        Cell("SignRound v1", scheme, "paper-v1"),
        Cell("SignRound v2", scheme, "paper-v2"),
        Cell("ours", scheme, "default"),
    ]
