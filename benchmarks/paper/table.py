"""docs/paper.md from the measured rows."""

from __future__ import annotations

import textwrap
from types import ModuleType
from typing import Any

from benchmarks.paper import bits
from benchmarks.paper.experiment import Cell, Setup, Summary, summary

HEAD = """# The paper's experiments

The tables of SignRound's paper (arXiv 2309.05516) with small models: RTN rounds to nearest, W4G128 is 4 bits with a
scale for every 128 weights of a row, W4 with one a row. Made by `python -m benchmarks.paper`; rows are in
benchmarks/results/paper/. Beside other tools, on a real model: [results.md](results.md).

All but the method is the same in every row: calibration tokens, embedding and output head (8 bits), scoring of the
dequantized weights in torch as `llama-perplexity --kl-divergence` does. KL: mean divergence from the original in nats,
with its standard deviation over the seeds of the sample order; methods without chance have none. CPU: seconds of one
core.

The rows were calibrated without BOS in each window, though the tokenizer adds it, before November 28, 2026
([LOG.md](LOG.md)).
"""


def document(tables: list[ModuleType], setup: Setup, rows: dict[str, dict[str, Any]]) -> str:
    """The page."""
    reference = {t.stem: _reference(rows, t.stem) for t in setup.texts}
    originals = ", ".join(f"{ppl:.2f} on {text}" for text, ppl in reference.items() if ppl is not None)
    protocol = (
        f"{setup.model.name} (perplexity of the original: {originals}), {setup.samples} × {setup.seqlen} tokens of "
        f"{setup.calibration.name}, {setup.steps} steps of {setup.batch_size} samples where a row says nothing else; "
        f"{setup.windows} windows of {setup.n_ctx} tokens of {' and '.join(t.name for t in setup.texts)}; seeds "
        f"{', '.join(map(str, setup.seeds))}."
    )
    return "\n".join([HEAD, textwrap.fill(protocol, 120), "", *(section(table, setup, rows) for table in tables)])


def section(table: ModuleType, setup: Setup, rows: dict[str, dict[str, Any]]) -> str:
    """One table, with a row for each measured cell."""
    texts = [t.stem for t in setup.texts]
    head = ["scheme", "method", *(f"{what}, {t}" for t in texts for what in ("PPL", "KL")), "seeds", "CPU s"]
    head += ["KL over GPTQ's"] if table.PEER else []
    lines = [f"## {table.TITLE}", "", table.TEXT, "", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    measured = [(c, s) for c in table.cells() if (s := summary(c, setup, rows)) is not None]
    for cell, found in measured:
        figures = [f"{found.ppl[t]:.2f} | {_with_spread(found.kld[t], found.kld_spread[t])}" for t in texts]
        line = [
            bits.SCHEMES.get(cell.scheme, cell.scheme),
            cell.label,
            *figures,
            str(found.seeds),
            f"{found.cpu_s:.0f}",
        ]
        line += [_ratio(cell, found, measured, texts[0])] if table.PEER else []
        lines.append(f"| {' | '.join(line)} |")
    missing = len(table.cells()) - len(measured)
    return "\n".join([*lines, "", *([f"{missing} rows are not measured yet.", ""] if missing else [])])


def _ratio(cell: Cell, found: Summary, measured: list[tuple[Cell, Summary]], text: str) -> str:
    """KL over that of the best GPTQ row of the scheme; a dash for GPTQ itself."""
    peers = [s.kld[text] for c, s in measured if c.scheme == cell.scheme and c.recipe is None]
    return f"{found.kld[text] / min(peers):.2f} ×" if peers and cell.recipe is not None else "–"


def _with_spread(value: float, spread: float | None) -> str:
    digits = 5 if value < 0.1 else 4
    return f"{value:.{digits}f}" + (f" ± {spread:.{digits}f}" if spread is not None else "")


def _reference(rows: dict[str, dict[str, Any]], text: str) -> float | None:
    return next((float(r["scores"][text]["ppl_reference"]) for r in rows.values() if text in r["scores"]), None)
