"""Table 6 of the paper: one hyper-parameter changed at a time."""

from __future__ import annotations

from typing import Any

from benchmarks.paper.experiment import Cell

NAME = "hyperparameters"
TITLE = "Hyper-parameters (the paper's table 6)"
TEXT = """W4G128, our default recipe at the steps, samples, length and batch size of this page; each row changes what it
names and nothing else. More text is more samples at the same number of steps."""
PEER = None

CHANGES: dict[str, dict[str, Any]] = {
    "as the other tables": {},
    "50 steps": {"steps": 50},
    "200 steps": {"steps": 200},
    "from nearest": {"start": "nearest"},
    "drift left": {"correct_drift": False},
    "rate 0.05/steps": {"lr": 0.0005},
    "rate 0.2/steps": {"lr": 0.002},
    "rate 0.7/steps": {"lr": 0.007},
    "scales' rate 0.1/steps": {"scale_lr": 0.001},
    "scales not tuned": {"tune_scales": False},
    "codes follow the scales": {"start": "nearest", "positions": "follow", "lr": 0.01, "scale_lr": 0.005},
    "absmax scales": {"scale_init": "absmax"},
    "plain squared error": {"loss": "mse"},
    "16 samples": {"samples": 16},
    "64 samples": {"samples": 64},
    "256 samples": {"samples": 256},
    "64 tokens a sample": {"seqlen": 64},
    "256 tokens a sample": {"seqlen": 256},
    "batch of 2": {"batch_size": 2},
    "batch of 8": {"batch_size": 8},
}


def cells() -> list[Cell]:
    """One cell a change."""
    return [Cell(label, "onnx:w4g128", "default", changes) for label, changes in CHANGES.items()]
