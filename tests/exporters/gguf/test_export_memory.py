"""Export streams: its memory does not depend on the number of layers, and it writes large matrices piece by piece."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.synthetic_run import Shape, write_synthetic_run
from signround_edge import run_directory
from tests.exporters.gguf.conftest import export

SMALL = Shape(layers=2, hidden=512, intermediate=2048, heads=8, kv_heads=4, vocab=3072)
GROWTH_MB = 20

# All in one process of its own, small model first, so that it is the large one alone that can raise the peak.
_CHILD = """
import resource, sys
from pathlib import Path
from exporters.gguf import GgufExporter
from exporters.interface import ExportOptions
from signround_edge.run_directory import RunDirectory
for run in map(Path, sys.argv[1:]):
    for dtype in (None, "f16"):
        options = ExportOptions(dtype, log=lambda line: None)
        GgufExporter().export(RunDirectory.open(run), run.with_name(f"{run.name}.gguf"), options)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def test_peak_memory_does_not_grow_with_the_number_of_layers(tmp_path: Path) -> None:
    """The second model has 42 million weights more: 42 MB of codes, 84 MB as f16."""
    runs = [write_synthetic_run(tmp_path / str(n), replace(SMALL, layers=n)).path for n in (2, 12)]
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, *map(str, runs)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[3])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    small, large = map(float, done.stdout.split())
    assert large - small < GROWTH_MB


@pytest.mark.parametrize("dtype", [None, "f16", "f32"])
def test_writing_some_rows_at_a_time_changes_no_byte(
    dtype: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_synthetic_run(tmp_path / "run", SMALL)
    whole = export(run, tmp_path / "whole.gguf", dtype=dtype)
    monkeypatch.setattr(run_directory, "_VALUES_AT_ONCE", 10_000)
    pieces = export(run, tmp_path / "pieces.gguf", dtype=dtype)
    assert whole.read_bytes() == pieces.read_bytes()
