"""The tables of `models`: what was tried, and what will work for a checkpoint."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from signround_edge.outlook import Outlook
from signround_edge.tested_models import TestedModels

# What only docs/models.md and --json have room for.
_FIGURES = ("ONNX route", "KL, texts", "KL, steps", "tokens/CPU s")


def render_tested(found: TestedModels) -> Table:
    """A line for each model, a column for each stage; reasons are in docs/models.md."""
    versions = ", ".join(f"{name} {version}" for name, version in found.versions.items())
    table = Table(title=f"small random models, taken the whole way with {versions}")
    table.caption = "what `models FOLDER` says holds for your checkpoint; the reason of each no: docs/models.md, --json"
    stages = [
        stage for stage in dict.fromkeys(s for stages in found.models.values() for s in stages) if stage not in _FIGURES
    ]
    for column in ("model", *stages):
        table.add_column(column)
    for name, results in found.models.items():
        table.add_row(name, *(results.get(stage, "").partition(":")[0] or "–" for stage in stages))
    return table


def render_outlook(found: Outlook) -> Table:
    """A line for each step: whether it will work, and how."""
    size = "" if found.parameters is None else f", {found.parameters / 1e6:,.1f} million parameters"
    table = Table(title=f"{found.model_type or 'no model that can be read'}{size}")
    for column in ("step", "", "how"):
        table.add_column(column, overflow="fold")
    for answer in found.answers:
        table.add_row(answer.step, "yes" if answer.works else "no", Text(answer.how))
    for note in found.notes:
        table.add_row("", "", Text(note))
    return table
