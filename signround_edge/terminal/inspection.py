"""The table of `inspect`."""

from __future__ import annotations

import math
from collections import Counter

from rich.table import Table

from signround_edge.inspection import Inspection


def render(found: Inspection) -> Table:
    """A table: one line per tensor type with counts and bytes, and the total."""
    title = f"{found.format}{' ' + found.scheme if found.scheme else ''}"
    table = Table(
        title=title,
        caption="\n".join(line for line in (found.source_check, _calibration(found.calibration)) if line) or None,
    )
    for column, justify in (("type", "left"), ("tensors", "right"), ("bytes", "right"), ("bits/weight", "right")):
        table.add_column(column, justify="right" if justify == "right" else "left")
    counts: Counter[str] = Counter(t.type for t in found.tensors)
    for kind, count in counts.most_common():
        group = [t for t in found.tensors if t.type == kind]
        size = sum(t.bytes for t in group)
        bits = 8 * size / max(1, sum(math.prod(t.shape) for t in group))
        table.add_row(kind, str(count), f"{size:,}", f"{bits:.4g}")
    table.add_section()
    table.add_row("total", str(len(found.tensors)), f"{found.total_bytes:,}", f"{found.bits_per_weight:.4g}")
    return table


def _calibration(found: dict[str, int | None] | None) -> str | None:
    if found is None:
        return None
    bos = (
        "without BOS, as the tokenizer adds none" if found["bos"] is None else f"each behind BOS (token {found['bos']})"
    )
    return f"calibrated on samples of {found['seqlen']} tokens, {bos}"
