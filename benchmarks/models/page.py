"""The table of docs/models.md, from the file of results."""

from __future__ import annotations

from pathlib import Path

from benchmarks.models.small_models import MODELS
from benchmarks.models.stages import STAGES
from signround_edge.tested_models import TestedModels

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- written by `python -m benchmarks.models --page` -->\n", "<!-- to here -->\n"


def write_page() -> None:
    """Put the table between its marks."""
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(before + BEGIN + table() + END + after, encoding="utf-8")


def table() -> str:
    """The table in Markdown, and below it a line for each "no"."""
    found = TestedModels.read()
    versions = ", ".join(f"{name} {version}" for name, version in found.versions.items())
    lines = [f"\nWith {versions}.\n", "| " + " | ".join(("model", "`model_type`", *STAGES)) + " |"]
    lines.append("|" + "---|" * (2 + len(STAGES)))
    reasons: list[str] = []
    for name, results in found.models.items():
        cells = []
        for stage in STAGES:
            short, _, reason = results.get(stage, "").partition(": ")
            cells.append(short or "–")
            if reason:
                reasons.append(f"- {name}, {stage}: {reason}")
        lines.append("| " + " | ".join((name, f"`{MODELS[name].model_type}`", *cells)) + " |")
    return "\n".join([*lines, "", *dict.fromkeys(reasons)]) + "\n\n"
