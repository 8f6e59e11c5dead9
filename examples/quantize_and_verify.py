"""The whole chain from Python: tune a model's rounding, write a GGUF file and an ONNX folder, prove both.

python examples/quantize_and_verify.py path/or/org/model texts.txt held-out.txt out
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import signround_edge as se


def main(model: str, calibration: str, text: str, out: str) -> int:
    """Exit code 1 when a file is not exact or does not behave like the tuned model."""
    folder = Path(out)
    run = se.quantize(
        model,
        "gguf:q4_0,onnx:w4g32",  # one grid, so one run serves both formats
        folder / "run",
        calibration=calibration,
        settings=se.RECIPES["fast"],
        resume=(folder / "run" / "manifest.json").is_file(),
        progress=lambda line: print(line, file=sys.stderr),
    )
    files = [se.export(run, "gguf", folder / "model-q4_0.gguf"), se.export(run, "onnx", folder / "model-onnx")]
    for file in files:
        found = se.inspect(file)
        print(f"{file.path}: {found.total_bytes:,} bytes, {found.bits_per_weight:.2f} bits a weight")
    proof = se.verify(run, files, text, reference=model, report=folder / "proof")
    for runtime in proof.runtimes:
        print(f"{runtime.artifact} on {runtime.name}: {runtime.reason or runtime.status}")
        if runtime.fidelity is not None:
            print(f"    KL divergence from the original {runtime.fidelity.kld_mean:.4f}")
    return 0 if proof.passed else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a Hugging Face folder, or a name such as org/model")
    parser.add_argument("calibration", help="UTF-8 text to tune on")
    parser.add_argument("text", help="UTF-8 text to verify on")
    parser.add_argument("out", help="folder for the run, the files and the proof")
    given = parser.parse_args()
    sys.exit(main(given.model, given.calibration, given.text, given.out))
