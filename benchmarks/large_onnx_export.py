"""Peak memory of `signround-edge export --format onnx` on a model whose data does not fit into 2 GB.

    python -m benchmarks.large_onnx_export                 # Llama 3 8B's shape: about 5 GB; up to 15 GB under --folder
    python -m benchmarks.large_onnx_export --layers 12     # quicker, and still over 2 GB

A synthetic run directory (random codes) is exported by the real command as a child process, in one data file and in
shards, and so is one with a quarter of the layers: the peak must not depend on their number. The exporter itself
compares every stored value with the run; here all tensors' places are read back, and ONNX Runtime loads both forms and
must compute the same finite logits from them (it needs three times the data's size for that). Everything is deleted at
the end.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import Cost, run_measured
from benchmarks.synthetic_run import Shape, finite_logits, write_synthetic_run
from exporters.onnx.artifact.reader import read_tensors
from runtime_tests.runtimes.onnx_runtime import OnnxRuntime

SHARD = "500M"


def main() -> int:
    """Command line; exit code 1 when the peak depends on the number of layers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--folder", type=Path, help="where to work (default: the system's temporary folder)")
    # The same export's peak varies by up to 130 MB; nine layers of Llama 3 8B have 1,900 MB.
    parser.add_argument("--slack-mb", type=float, default=200, help="by how much the peaks of both sizes may differ")
    args = parser.parse_args()
    shape = Shape(layers=args.layers, block_format="Q4_0", head_format="Q8_0")
    rows = []
    for sized in (replace(shape, layers=max(1, args.layers // 4)), shape):
        with tempfile.TemporaryDirectory(prefix="large-onnx-", dir=args.folder) as folder:
            rows += _measure(Path(folder), sized)
    print(json.dumps(rows, indent=1))
    peaks = {kind: [r["peak_mb"] for r in rows if r["export"] == kind] for kind in ("one file", "shards")}
    grown = [f"{kind}: {found}" for kind, found in peaks.items() if max(found) - min(found) > args.slack_mb]
    print("; ".join(grown) or "the peak does not depend on the number of layers", file=sys.stderr)
    return 1 if grown else 0


def _measure(folder: Path, shape: Shape) -> list[dict[str, Any]]:
    run = write_synthetic_run(folder / "run", shape)
    rows, logits = [], []
    for kind, flags in {"one file": [], "shards": ["--max-shard-size", SHARD]}.items():
        with _exported(run.path, folder / "out", flags) as (out, size, cost):
            stored = sum(row[3] for row in read_tensors(out))
            shards = [file.stat().st_size for file in out.glob("model.onnx.data*")]
            logits.append(finite_logits(OnnxRuntime(), out, shape.vocab))
        rows.append(
            {
                "export": kind,
                "layers": shape.layers,
                "weights": shape.parameters(),
                "file_bytes": size,
                "tensor_bytes": stored,
                "files": len(shards),
                "largest_file": max(shards),
                **asdict(cost),
            }
        )
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    if not np.array_equal(*logits):
        raise AssertionError("ONNX Runtime computes other logits from the shards")
    return rows


@contextmanager
def _exported(run: Path, folder: Path, flags: list[str]) -> Iterator[tuple[Path, int, Cost]]:
    """(folder, bytes of all its files, cost of the command); it exists only within."""
    command = [sys.executable, "-m", "signround_edge.cli", "export", str(run), "--format", "onnx", "-o", str(folder)]
    try:
        cost = run_measured([*command, *flags], folder.with_name("log.txt"))
        yield folder, sum(file.stat().st_size for file in folder.iterdir()), cost
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
