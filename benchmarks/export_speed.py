"""What `signround-edge export` to GGUF costs beside `cp` of its file and llama.cpp's quantizer.

    python -m benchmarks.large_export --speed --layers 10    # ten minutes, 6 GB of disk under --folder

Start-up is imports of torch and transformers, whose seconds vary by more than the data costs. So one process exports a
small run and a large one, several times each, and the difference of the least CPU times is what the data costs; the
command as a whole is measured once more. `cp` and the hash of the run's files are measured in between.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from benchmarks.llama_quantize import quantize, why_unavailable
from benchmarks.measure import Cost, run_measured
from benchmarks.synthetic_run import Shape, write_synthetic_run

SMALL_LAYERS = 2
_SHAPE = Shape(hidden=2048, intermediate=8192, heads=16, kv_heads=4, vocab=32000)
_REPEATED = 3  # times; the least CPU time counts

# Name of the row → grid of the blocks, `--dtype`, preset of llama-quantize (Q2_K_S wants an importance matrix).
_ROWS = {
    "Q4_0": ("Q4_0", None, "Q4_0"),
    "Q4_K_M (Q4_K, head Q6_K)": ("Q4_K", None, "Q4_K_M"),
    "Q2_K_S (Q2_K, head Q6_K)": ("Q2_K", None, "Q2_K"),
    "F16 (of Q4_0)": ("Q4_0", "f16", None),
}


# Arguments: where to write, --dtype or "", runs. A line of JSON a run: seconds of CPU to open it, and to export it.
_CHILD = """
import json, sys, time
from pathlib import Path
from exporters.gguf import GgufExporter
from exporters.interface import ExportOptions
from signround_edge.run_directory import RunDirectory
out, dtype, *runs = sys.argv[1:]
options = ExportOptions(dtype or None, log=lambda line: None)
best = {run: [float("inf")] * 2 for run in runs}
for _ in range(REPEATED + 1):
    for run, costs in best.items():
        began = time.process_time()
        opened = RunDirectory.open(run)
        costs[0] = min(costs[0], time.process_time() - began)
        began = time.process_time()
        GgufExporter().export(opened, Path(out), options)
        costs[1] = min(costs[1], time.process_time() - began)
print(json.dumps(list(best.values())))
"""


def measure_speed(folder: Path | None, layers: int) -> str:
    """A Markdown table; needs `layers` above `SMALL_LAYERS`."""
    lines = [
        "| file | whole command, CPU s | data, GB/s written | of `cp` | without hashing, GB/s written | of `cp` "
        "| without hashing, GB/s read and written | `cp`, GB/s | llama-quantize, GB/s written |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, (grid, dtype, preset) in _ROWS.items():
        with tempfile.TemporaryDirectory(prefix="export-speed-", dir=folder) as temporary:
            lines.append(_row(name, Path(temporary), grid, dtype, preset, layers))
        print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines)


def _row(name: str, folder: Path, grid: str, dtype: str | None, preset: str | None, layers: int) -> str:
    runs = [
        write_synthetic_run(folder / f"run-{count}", replace(_SHAPE, layers=count, block_format=grid)).path
        for count in (SMALL_LAYERS, layers)
    ]
    files = [folder / f"{run.name}.gguf" for run in runs]
    whole = [_export(run, file, folder, dtype).cpu_s for run, file in zip(runs, files, strict=True)]
    copying = min(_copy(files[1], folder) for _ in range(_REPEATED))
    opened, exported = _in_one_process(runs, folder, dtype)
    read = _bytes(runs[1].rglob("*.safetensors")) - _bytes(runs[0].rglob("*.safetensors"))
    written = _bytes(files[1:]) - _bytes(files[:1])
    copy, data, bare = _bytes(files[1:]) / copying / 1e9, written / (opened + exported) / 1e9, written / exported / 1e9
    both = (read + written) / exported / 1e9
    peer = "–" if preset is None or why_unavailable() else f"{_quantizer(runs[0], folder, preset):.3f}"
    return (
        f"| {name}, {_bytes(files[1:]) / 1e6:.0f} MB | {whole[1]:.1f} | {data:.2f} | {data / copy:.2f} | {bare:.2f} | "
        f"{bare / copy:.2f} | {both:.2f} | {copy:.2f} | {peer} |"
    )


def _in_one_process(runs: list[Path], folder: Path, dtype: str | None) -> tuple[float, float]:
    """CPU seconds that the second run takes beyond the first: to open, and to export."""
    code = _CHILD.replace("REPEATED", str(_REPEATED))
    command = [sys.executable, "-c", code, str(folder / "again.gguf"), dtype or "", *map(str, runs)]
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
    (folder / "again.gguf").unlink()
    small, large = json.loads(done.stdout)
    return large[0] - small[0], large[1] - small[1]


def _copy(file: Path, folder: Path) -> float:
    """CPU seconds of `cp`."""
    copy = folder / "copy.gguf"
    cost = run_measured(["cp", str(file), str(copy)], folder / "log.txt")
    copy.unlink()
    return cost.cpu_s


def _bytes(files: Iterable[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def _export(run: Path, out: Path, folder: Path, dtype: str | None) -> Cost:
    command = [sys.executable, "-m", "signround_edge.cli", "export", str(run), "--format", "gguf", "-o", str(out)]
    return run_measured(
        [*command, *(["--dtype", dtype] if dtype else [])], folder / "log.txt", {"OMP_NUM_THREADS": "1"}
    )


def _quantizer(run: Path, folder: Path, preset: str) -> float:
    """GB a CPU second that llama.cpp's quantizer writes, on one thread, from the F16 file of the same weights."""
    source, out = folder / "f16.gguf", folder / "theirs.gguf"
    _export(run, source, folder, "f16")
    cost = quantize(source, out, preset)
    return out.stat().st_size / cost.cpu_s / 1e9
