"""The yardstick: Olive's GPTQ pass, from PyPI in an environment of its own, on our calibration samples.

It rounds the decoder matrices asymmetrically in blocks, as our `onnx:w<bits>g<size>-asym` stores them.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.environment import installed
from benchmarks.measure import Cost, run_measured

REQUIREMENTS = ("torch==2.13.0", "transformers==5.23.0", "safetensors", "datasets", "requests", "olive-ai==0.13.0")
PROCESS = Path(__file__).parent / "olive_gptq_process.py"


def environment(folder: Path) -> Path:
    """Path of the environment's Python; installs it once."""
    return installed(folder, REQUIREMENTS, "olive") / "python"


def quantize(python: Path, model: Path, tokens: Path, bits: int, block_size: int, out: Path) -> tuple[Path, Cost]:
    """Quantize with the samples "tokens" int64 [samples, seqlen] of a safetensors file.

    Returns:
        A safetensors file of Hugging Face parameter → dequantized weight f32, and what it cost.
    """
    weights = out / "weights.safetensors"
    command = [str(python), PROCESS, model, tokens, str(bits), str(block_size), out / "olive", weights]
    return weights, run_measured([str(part) for part in command], out / "log.txt", {"HF_HUB_OFFLINE": "1"})
