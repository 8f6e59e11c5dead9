"""The bench plans at the bytes of a scheme."""

from pathlib import Path

import pytest

from benchmarks.planned_types import plan_beside
from signround_edge.schemes.planned_types import PlannedTypes


@pytest.mark.full
def test_a_plan_keeps_the_bytes_of_its_scheme(tiny_llama: Path, calibration_text: Path, tmp_path: Path) -> None:
    found = plan_beside(tiny_llama, "plan:gguf:q4_k_m", calibration_text, 2, 32, tmp_path)
    assert PlannedTypes.read(found.file).file_bytes == found.file_bytes
    with pytest.raises(SystemExit, match=r"plan:gguf:q9: `plan` knows the bytes of .*gguf:q4_k_m"):
        plan_beside(tiny_llama, "plan:gguf:q9", calibration_text, 2, 32, tmp_path)
