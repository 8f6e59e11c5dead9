"""The table of `analyze`."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.markup import escape as as_it_is
from rich.table import Table

from signround_edge.analysis.report import HEADINGS, figures, sentences
from signround_edge.analysis.roundings import Analysis


def render(analysis: Analysis) -> RenderableType:
    """A line for each decoder block and the total, and the notes."""
    table = Table(title=f"{analysis.model}, {analysis.scheme}")
    for heading in ("block", *HEADINGS, "loss rounded", "loss tuned"):
        table.add_column(heading, justify="left" if heading == "block" else "right")
    for block in sorted({*analysis.blocks, *(u.block for u in analysis.losses)}):
        found = analysis.blocks.get(block)
        own = [u for u in analysis.losses if u.block == block]
        # Losses of layer-wise tuning are of different outputs, and have no sum.
        loss = (f"{own[0].rounded:.3e}", f"{own[0].tuned:.3e}") if len(own) == 1 else ("", "")
        table.add_row(str(block), *(figures(found) if found else [""] * len(HEADINGS)), *loss)
    if analysis.total is not None:
        table.add_section()
        table.add_row("all", *figures(analysis.total), "", "")
    return Group(table, *map(as_it_is, sentences(analysis)))
