"""What `signround-edge export` to GGUF costs beside `cp` of its file and llama.cpp's quantizer.

    python -m benchmarks.large_export --speed --layers 10    # ten minutes, 6 GB of disk under --folder

The real command runs on synthetic runs of two sizes. The difference of both is what the data costs; what is left is
start-up, which imports of torch and transformers are. `cp` and the hash of the run's files are measured in between.
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.llama_quantize import quantize, why_unavailable
from benchmarks.measure import Cost, run_measured
from benchmarks.synthetic_run import Shape, write_synthetic_run
from signround_edge.files import sha256_of

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


@dataclass(frozen=True)
class _Sized:
    """One export: seconds of CPU, and bytes.

    Attributes:
        command, copy, hashing: CPU seconds of the command, of `cp` of its file, and of the sha256 of what it reads.
        read, written: bytes of the run and of the file.
        wall: of the command.
    """

    command: float
    copy: float
    hashing: float
    read: int
    written: int
    wall: float


def measure_speed(folder: Path | None, layers: int) -> str:
    """A Markdown table; needs `layers` above `SMALL_LAYERS`."""
    lines = [
        "| file | command, CPU s (wall) | start-up, CPU s | data, GB/s written | of `cp` | without hashing, GB/s | of `cp`"
        " | read + written without hashing, GB/s | `cp`, GB/s | llama-quantize, GB/s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, (grid, dtype, preset) in _ROWS.items():
        with tempfile.TemporaryDirectory(prefix="export-speed-", dir=folder) as temporary:
            lines.append(_row(name, Path(temporary), grid, dtype, preset, layers))
        print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines)


def _row(name: str, folder: Path, grid: str, dtype: str | None, preset: str | None, layers: int) -> str:
    sizes = (SMALL_LAYERS, layers)
    runs = [
        write_synthetic_run(folder / f"run-{count}", replace(_SHAPE, layers=count, block_format=grid)).path
        for count in sizes
    ]
    small, large = (_measure(run, folder, dtype) for run in runs)
    written, read = large.written - small.written, large.read - small.read
    command, hashing = large.command - small.command, large.hashing - small.hashing
    copy = large.written / large.copy / 1e9
    data, bare = written / command / 1e9, written / (command - hashing) / 1e9
    start = large.command - command / written * large.written
    both = (read + written) / (command - hashing) / 1e9
    peer = "–" if preset is None or why_unavailable() else f"{_quantizer(runs[0], folder, preset):.3f}"
    return (
        f"| {name}, {large.written / 1e6:.0f} MB | {large.command:.2f} ({large.wall:.1f}) | {start:.1f} | {data:.2f} | "
        f"{data / copy:.2f} | {bare:.2f} | {bare / copy:.2f} | {both:.2f} | {copy:.2f} | {peer} |"
    )


def _measure(run: Path, folder: Path, dtype: str | None) -> _Sized:
    out, copy = folder / "model.gguf", folder / "copy.gguf"
    commands, copies, hashes = [], [], []
    parts = sorted((run / "blocks").iterdir())
    for _ in range(_REPEATED):
        commands.append(_export(run, out, folder, dtype))
        copies.append(run_measured(["cp", str(out), str(copy)], folder / "log.txt").cpu_s)
        copy.unlink()
        began = time.process_time()
        for part in parts:
            sha256_of(part)
        hashes.append(time.process_time() - began)
    written = out.stat().st_size
    out.unlink()
    best = min(commands, key=lambda cost: cost.cpu_s)
    read = sum(part.stat().st_size for part in parts)
    return _Sized(best.cpu_s, min(copies), min(hashes), read, written, best.wall_s)


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
