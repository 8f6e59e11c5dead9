"""What a run has found: JSON lines, appended row by row, and the same rows as Markdown tables."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.parts import Row
from benchmarks.gpu.tables import TABLES, Table


class Report:
    """Rows as they come, on disk at once.

    Attributes:
        rows: all of them.
    """

    def __init__(self, out: Path, title: str) -> None:
        """Write into the folder `out`, which is made; what an earlier run left there is replaced."""
        self.rows: list[Row] = []
        self._out, self._title, self._began = out, title, time.monotonic()
        out.mkdir(parents=True, exist_ok=True)
        (out / "results.jsonl").write_text("")
        self._write_tables()

    def add(self, row: Row) -> None:
        """Keep a row, with what follows from earlier ones."""
        row = {**row, **self._shares(row), "at_s": round(time.monotonic() - self._began, 1)}
        self.rows.append(row)
        with (self._out / "results.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._write_tables()

    def _write_tables(self) -> None:
        (self._out / "table.md").write_text(markdown(self._title, self.rows), encoding="utf-8")

    def _shares(self, row: Row) -> Row:
        """Of the best product of the same dtype, and of 100 steps of the same block."""
        found: Row = {}
        if "tflops" in row and row["table"] != "products":
            dtype = row.get("dtype", "bfloat16")
            products = [r["tflops"] for r in self.rows if r["table"] == "products" and r.get("dtype") == dtype]
            if products:
                found["of_ceiling_percent"] = 100 * row["tflops"] / max(products)
        if "sum_s" in row:
            same = [r for r in self.rows if r["table"] == "where" and "step_ms" in r]
            steps = [r["step_ms"] for r in same if (r["block"], r["format"]) == (row["block"], row["format"])]
            if steps:
                found["steps_100"] = row["sum_s"] / (0.1 * steps[-1])
        return found


def markdown(title: str, rows: list[Row]) -> str:
    """All rows as Markdown: a table of each kind that has any."""
    parts = [f"# {title}", ""]
    for name, table in TABLES.items():
        own = [row for row in rows if row["table"] == name]
        if own:
            parts += [f"## {table.title}", "", *([table.note, ""] if table.note else []), *_lines(table, own), ""]
    return "\n".join(parts)


def _lines(table: Table, rows: list[Row]) -> list[str]:
    lines = ["| " + " | ".join(column.head for column in table.columns) + " |", "|---" * len(table.columns) + "|"]
    for row in rows:
        if "failed" in row:
            empty = [""] * (len(table.columns) - 2)
            cells = [_shown(row["what"]), f"no figures: {_shown(row['failed'])}", *empty]
        else:
            cells = [_shown(row.get(column.key)) for column in table.columns]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    text = f"{value:,}" if isinstance(value, int) else str(value)
    return " ".join(text.replace("|", "\\|").split())
