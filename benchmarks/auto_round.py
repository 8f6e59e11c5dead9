"""The yardstick: Intel's auto-round, from PyPI in an environment of its own, to a GGUF file."""

from __future__ import annotations

from pathlib import Path

from benchmarks.environment import installed
from benchmarks.measure import Cost, run_measured

VERSION = "0.16.1"
REQUIREMENTS = ("torch==2.13.0", f"auto-round=={VERSION}", "gguf==0.19.0", "sentencepiece", "protobuf")


def environment(folder: Path) -> Path:
    """Path of the environment's `auto-round` command; installs it once."""
    return installed(folder, REQUIREMENTS, "auto-round") / "auto-round"


def quantize(
    command: Path,
    model: Path,
    scheme: str,
    calibration: Path,
    out: Path,
    samples: int,
    seqlen: int,
    steps: int,
    batch_size: int,
) -> tuple[Path, Cost]:
    """Quantize to "gguf:<preset>" with the given settings; `calibration` is JSON lines. Returns (file, cost)."""
    arguments = ["quantize", "--model", model, "--scheme", scheme, "--format", scheme, "--device_map", "cpu"]
    arguments += ["--dataset", calibration.resolve(), "--nsamples", samples, "--seqlen", seqlen, "--iters", steps]
    arguments += ["--batch_size", batch_size, "--output_dir", out]
    cost = run_measured([str(command), *map(str, arguments)], out / "log.txt", {"HF_HUB_OFFLINE": "1"})
    (file,) = out.rglob("*.gguf")
    return file, cost
