"""Peak memory of `signround-edge export` on a model of 8 billion weights, and whether its files are right.

    python -m benchmarks.large_export                  # about 10 minutes, up to 30 GB of disk under --folder
    python -m benchmarks.large_export --layers 4       # quicker
    python -m benchmarks.large_export --speed --layers 10   # instead: its cost beside `cp`, see benchmarks.export_speed

A synthetic run directory (random codes, no model behind it) is exported by the real command as a child process: packed,
as f16 (a file of more than 16 GB), and split. The same for a quarter of the layers: the peak must not depend on them.
Every file is read back, and rows of sampled tensors are compared with the run directory's weights; llama.cpp then loads
the packed file, whole and split, and must compute the same finite logits from both. Everything is deleted at the end.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, quants

from benchmarks.export_speed import SMALL_LAYERS, measure_speed
from benchmarks.measure import Cost, run_measured
from benchmarks.synthetic_run import Shape, finite_logits, write_synthetic_run
from exporters.gguf.container.reader import GgufFile
from exporters.gguf.families.table import canonical_config
from exporters.gguf.placement import Placement, builtin_placements
from runtime_tests.runtimes.llama_cpp import LlamaCppRuntime
from signround_edge.run_directory import RunDirectory

LIMIT_MB = 3000
SPLIT = "2G"
SAMPLED_TENSORS, SAMPLED_ROWS = 40, 64


def main() -> int:
    """Command line; exit code 1 when a peak is above the limit or depends on the number of layers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--block-format", default="Q4_0", help="grid of the matrices: Q4_0, Q4_K, …")
    parser.add_argument("--folder", type=Path, help="where to work (default: the system's temporary folder)")
    parser.add_argument("--slack-mb", type=float, default=100, help="by how much the peaks of both sizes may differ")
    parser.add_argument("--speed", action="store_true", help="print the table of benchmarks.export_speed instead")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that the folder is removed
    if args.speed:
        print(measure_speed(args.folder, max(args.layers, 2 * SMALL_LAYERS)))
        return 0
    shape = Shape(layers=args.layers, block_format=args.block_format)
    rows = []
    for sized in (replace(shape, layers=max(1, args.layers // 4)), shape):
        with tempfile.TemporaryDirectory(prefix="large-export-", dir=args.folder) as folder:
            rows += _measure(Path(folder), sized, load=sized == shape)
    print(json.dumps(rows, indent=1))
    return _judge(rows, args.slack_mb)


def _judge(rows: list[dict[str, Any]], slack_mb: float) -> int:
    peaks: dict[str, list[float]] = {}
    for row in rows:
        peaks.setdefault(row["export"], []).append(row["peak_mb"])
    wrong = [f"{kind}: {max(found):.0f} MB" for kind, found in peaks.items() if max(found) > LIMIT_MB]
    wrong += [f"{kind} grows: {found}" for kind, found in peaks.items() if max(found) - min(found) > slack_mb]
    print("; ".join(wrong) or f"all peaks below {LIMIT_MB} MB and independent of the number of layers", file=sys.stderr)
    return 1 if wrong else 0


def _measure(folder: Path, shape: Shape, load: bool) -> list[dict[str, Any]]:
    """Rows of figures for one size; each file is deleted before the next is written."""
    _say(f"writing a run of {shape.parameters() / 1e9:.2f} billion weights, {shape.layers} layers")
    run = write_synthetic_run(folder / "run", shape)
    rows, logits = [], {}
    exports = {"packed": [], "f16": ["--dtype", "f16"], **({"split": ["--split-max-size", SPLIT]} if load else {})}
    for kind, flags in exports.items():
        with _exported(run.path, folder / kind, flags) as (path, size, cost):
            row = {"export": kind, "layers": shape.layers, "weights": shape.parameters(), "file_bytes": size}
            row |= {**asdict(cost), "values_compared": _compare(run, path)}
            if load and kind != "f16":  # 16 GB of f16 would not fit beside everything else
                logits[kind] = finite_logits(LlamaCppRuntime(), path, shape.vocab)
        _say(json.dumps(row))
        rows.append(row)
    if logits and not np.array_equal(logits["packed"], logits["split"]):
        raise AssertionError("llama.cpp computes other logits from the split files")
    return rows


@contextmanager
def _exported(run: Path, folder: Path, flags: list[str]) -> Iterator[tuple[Path, int, Cost]]:
    """(file to load, bytes of all files, cost of the command); the files exist only within."""
    command = [sys.executable, "-m", "signround_edge.cli", "export", str(run), "--format", "gguf"]
    try:
        cost = run_measured([*command, "-o", str(folder / "model.gguf"), *flags], folder / "log.txt")
        files = sorted(folder.glob("*.gguf"))
        yield files[0], sum(file.stat().st_size for file in files), cost
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _compare(run: RunDirectory, path: Path) -> int:
    """Values compared between the file, through gguf-py's dequantizer, and the run: groups of rows of many tensors."""
    file = GgufFile.open(path)
    placements = builtin_placements(run, canonical_config(run.config))
    assert {p.gguf_name for p in placements} == set(file.tensors)
    rng = np.random.default_rng(1)
    # The embedding, the head and a sample of all others.
    chosen = [p for p in placements if not p.gguf_name.startswith("blk.")]
    others = [p for p in placements if p not in chosen]
    chosen += [others[i] for i in rng.permutation(len(others))[:SAMPLED_TENSORS]]
    return sum(_compare_rows(run, file, placement, rng) for placement in chosen)


def _compare_rows(run: RunDirectory, file: GgufFile, placement: Placement, rng: np.random.Generator) -> int:
    info, data = file.tensors[placement.gguf_name], file.raw(placement.gguf_name)
    if not run.is_quantized(placement.hf_names[0]):
        expected = run.float_tensor(placement.hf_names[0]).float().numpy()[None, :]
        picked = np.arange(1)
    else:
        tensor = run.quantized(placement.hf_names[0])
        picked = np.sort(rng.integers(0, tensor.shape[0], SAMPLED_ROWS))
        picked[0], picked[-1] = 0, tensor.shape[0] - 1
        rows = picked if placement.rows is None else placement.rows[picked]
        expected = tensor.take_rows(torch.from_numpy(rows)).dequantize().numpy()
    if info.ggml_type.name == "F16":
        expected = expected.astype(np.float16).astype(np.float32)
    found = quants.dequantize(np.array(data[picked]), GGMLQuantizationType(info.ggml_type.number))
    if not np.array_equal(found.reshape(expected.shape), expected):
        raise AssertionError(f"{file.path}: tensor {placement.gguf_name} does not hold the run's weights")
    return int(expected.size)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
