"""Damaged GGUF files end in exit code 1 or 2 and one sentence. 6 cases by default, 2,000 with `make test-all`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

_FULL = [
    pytest.param(first, 500, 5, "q4_0,q4_k_m,q2_k_s,iq4_xs", marks=pytest.mark.full) for first in range(0, 2000, 500)
]


@pytest.mark.parametrize(("first", "cases", "really", "schemes"), [(10_000, 6, 0, "q4_0"), *_FULL])
def test_damaged_files_end_in_one_sentence(first: int, cases: int, really: int, schemes: str) -> None:
    numbers = {"first": first, "cases": cases, "really": really, "schemes": schemes}
    flags = [str(part) for name, value in numbers.items() for part in (f"--{name}", value)]
    # A process of its own: it forks, which a test worker with its threads had better not do.
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.fuzz_gguf", *flags],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:] + done.stdout[-2000:]
    found = json.loads(done.stdout)
    assert found["cases"] == cases
    assert found["verify_exit_codes"].get("1", 0) > cases / 2
    assert found["weights_compared"] > 0
