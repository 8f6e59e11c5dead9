"""The tables of presets: which rows they put side by side."""

from __future__ import annotations

from typing import Any

from benchmarks.table import planned_sections, preset_sections, sections

TEXT = "64x256, batch 8, a.txt → b.txt"


def row(tool: str, kl: float, steps: int = 0, size: int = 1000, **more: Any) -> dict[str, Any]:
    figures = {"kld_mean": kl, "ppl": 10 + kl, "top1_agreement": 1 - kl, "bits_per_weight": 4.5, "bytes": size}
    return {
        "key": f"{tool} {steps} steps, {TEXT}",
        "tool": tool,
        "scheme": "gguf:q4_0",
        "steps": steps,
        **figures,
        **more,
    }


def last_line(rows: list[dict[str, Any]]) -> str:
    (section,) = preset_sections("model", rows)
    return section.split("\n|")[-1].split("\n")[0]


def test_a_preset_is_compared_with_the_imatrix_of_the_same_text() -> None:
    rows = [
        row("llama-quantize", 0.4),
        row("llama-quantize-imatrix", 0.2, size=1010),
        row("signround-edge", 0.05, 20),
        row("signround-edge", 0.19),
        row("signround-edge", 0.01, 30, start="nearest"),  # of the former way
        row("signround-edge", 0.01, 20) | {"key": "signround-edge 20 steps, other text"},
    ]
    assert last_line(rows) == (
        " gguf:q4_0 | 1,000 | 4.500 | 0.4000 | 0.2000 (+1.00 % bytes) | 0.1900 | 0.0500 | 0.25 × | 10.20 → 10.05 |"
        " 80.0 → 95.0 % |"
    )


def test_steps_of_a_whole_model_stage_are_named() -> None:
    rows = [row("llama-quantize-imatrix", 0.2), row("signround-edge", 0.19), row("signround-edge", 0.05, 20)]
    rows.append(row("signround-edge", 0.04, 20, whole_model_steps=500))
    assert "| – | 0.2000 | 0.1900 | 0.0400 (20 + 500) | 0.20 × |" in last_line(rows)


def test_without_tuning_there_is_nothing_to_compare() -> None:
    rows = [row("llama-quantize-imatrix", 0.2), row("signround-edge", 0.19)]
    assert last_line(rows).endswith("| 0.1900 | – | – | – | – |")


def test_rows_of_two_machines_are_told_apart() -> None:
    figures = {"kld_stderr": 0.0, "wall_s": 2.0, "cpu_s": 1.0, "peak_mb": 3.0, "ppl_reference": 10.0}
    rows = [
        row("auto-round", 0.2, machine="fast", **figures),
        row("signround-edge", 0.1, machine="slow", **figures),
    ]
    (table,) = sections("model", rows)
    assert "| 2 | 1 [1] | 3 |" in table
    assert "| 2 | 1 [2] | 3 |" in table
    assert "[1] fast; [2] slow." in table
    (table,) = sections("model", rows[:1])
    assert "| 2 | 1 | 3 |" in table
    assert table.rstrip().endswith("b.txt. fast.")


def test_planned_types_stand_beside_the_scheme_whose_bytes_they_keep() -> None:
    other_text = {"key": "signround-edge 20 steps, other text"}
    rows = [
        row("signround-edge", 0.19),
        row("signround-edge", 0.02, 20, scheme="plan:gguf:q4_0", size=990, predicted_kl=0.021),
        row("signround-edge", 0.03, 20) | other_text,
    ]
    assert planned_sections("model", rows) == []
    (section,) = planned_sections("model", [*rows, row("signround-edge", 0.04, 20)])
    assert section.splitlines()[-1] == "| gguf:q4_0 | 20 | 1,000 | 990 | 0.0400 | 0.0200 | 0.0210 | 0.50 × |"


def test_presets_may_have_no_row_of_rounding() -> None:
    assert "| – | 0.2000 | – | 0.0500 | 0.25 × |" in last_line(
        [row("llama-quantize-imatrix", 0.2), row("signround-edge", 0.05, 20)]
    )
